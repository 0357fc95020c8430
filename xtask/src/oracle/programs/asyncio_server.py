"""A small HTTP/1.1 server on asyncio's streams, which closes idle connections after a second. Arguments: address and port."""

import asyncio
import socket
import sys


async def handle(reader, writer):
    try:
        while True:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), timeout=1)
            line, _, rest = head.partition(b"\r\n")
            method, target, version = line.split(b" ")
            fields = [field.partition(b":") for field in rest.lower().splitlines() if field]
            fields = {name.strip(): value.strip() for name, _, value in fields}
            await reader.readexactly(int(fields.get(b"content-length", 0)))
            connection = fields.get(b"connection", b"keep-alive" if version == b"HTTP/1.1" else b"close")
            close = b"close" in connection or target == b"/close"
            body = b"x" * 100_000 if target == b"/large" else b"hello\n"
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(body)
            if close:
                answer += b"cOnnection:\t close\r\n"
            elif version == b"HTTP/1.0":
                answer += b"Connection: Keep-Alive\r\n"
            writer.write(answer + b"\r\n" + (b"" if method == b"HEAD" else body))
            await writer.drain()
            if close:
                break
    except (asyncio.TimeoutError, asyncio.IncompleteReadError, ValueError, ConnectionError):
        pass
    writer.close()


async def main():
    # By itself asyncio would not take IPv4 on an IPv6 socket.
    both = ":" in sys.argv[1]
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server((sys.argv[1], int(sys.argv[2])), family=family, dualstack_ipv6=both, backlog=4096)
    server = await asyncio.start_server(handle, sock=listener, backlog=4096)
    await server.serve_forever()


asyncio.run(main())
