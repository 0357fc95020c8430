"""Clients of the standard library: `client urllib|http.client URL REQUESTS`."""

import http.client
import sys
import urllib.parse
import urllib.request

how, url, requests = sys.argv[1], sys.argv[2], int(sys.argv[3])
if how == "urllib":
    # It sends `Connection: close`.
    for _ in range(requests):
        with urllib.request.urlopen(url) as response:
            response.read()
else:
    parts = urllib.parse.urlsplit(url)
    # Ten requests for each connection, which it then closes.
    for _ in range(requests // 10):
        connection = http.client.HTTPConnection(parts.hostname, parts.port)
        for _ in range(10):
            connection.request("GET", parts.path)
            response = connection.getresponse()
            response.read()
            if response.will_close:
                break
        connection.close()
