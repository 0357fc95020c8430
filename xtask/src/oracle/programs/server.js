// A server on node:http. Arguments: address and port.
const http = require("node:http");

const server = http.createServer((request, response) => {
  switch (request.url.split("?")[0]) {
    case "/close":
      response.setHeader("Connection", "close");
      return response.end("closing\n");
    case "/large":
      return response.end("x".repeat(100_000));
    case "/chunked":
      for (let i = 0; i < 3; i++) response.write("GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
      return response.end();
    case "/empty":
      return response.writeHead(204).end();
    default:
      return response.end("hello\n");
  }
});
server.listen({ host: process.argv[2], port: Number(process.argv[3]), backlog: 4096 });
