// A client on node:http's agent: `client keep-alive|close URL REQUESTS CONCURRENCY`.
const http = require("node:http");

const [how, url, requests, concurrency] = process.argv.slice(2);
const agent = new http.Agent({ keepAlive: how === "keep-alive", maxSockets: Number(concurrency) });
let left = Number(requests);
for (let i = left; i > 0; i--) {
  const done = () => {
    if (--left === 0) agent.destroy();
  };
  http.get(url, { agent }, (response) => response.resume().on("close", done)).on("error", (error) => {
    console.error(error.message);
    done();
  });
}
