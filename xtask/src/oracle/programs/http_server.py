"""A server on http.server. Arguments: address and port."""

import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    # The default of http.server is 1.0, which is tried with requests for /1.0.
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = b"hello\n"
        if self.path == "/large":
            body = b"x" * 100_000
        if self.path == "/1.0":
            self.protocol_version = "HTTP/1.0"
            self.close_connection = True
        if self.path == "/empty":
            self.send_response(204)
            return self.end_headers()
        self.send_response(200)
        if self.path == "/close":
            self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
    request_queue_size = 4096


Server((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
