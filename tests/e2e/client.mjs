// A client with the `ws` package for the tests: commands on standard input, events on standard output, each as one
// line of JSON. The argument is {"url": ..., "protocols": [...], "options": {...}}.

import { createInterface } from "node:readline";
import WebSocket from "ws";

const tell = event => process.stdout.write(JSON.stringify(event) + "\n");
const { url, protocols, options } = JSON.parse(process.argv[2]);
const socket = new WebSocket(url, protocols, options);

socket.on("upgrade", response => tell({ event: "upgrade", headers: response.headers }));
socket.on("open", () => tell({ event: "open", protocol: socket.protocol, extensions: socket.extensions }));
socket.on("message", (data, isBinary) => tell(
  isBinary ? { event: "message", binary: data.toString("hex") } : { event: "message", text: data.toString() }));
socket.on("pong", data => tell({ event: "pong", data: data.toString() }));
socket.on("error", error => tell({ event: "error", message: error.message }));
socket.on("close", (code, reason) => {
  tell({ event: "close", code, reason: reason.toString() });
  process.stdin.destroy();
});
socket.on("unexpected-response", async (request, response) => {
  let body = "";
  for await (const chunk of response) body += chunk;
  tell({ event: "unexpected-response", status: response.statusCode, headers: response.headers, body });
  process.stdin.destroy();
});

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  if ("text" in command) socket.send(command.text);
  else if ("binary" in command) socket.send(Buffer.from(command.binary, "hex"));
  else if ("ping" in command) socket.ping(command.ping);
  else socket.close(command.code, command.reason);
}
