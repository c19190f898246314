// engine.io-client for the tests: commands on standard input, events on standard output, each as one line of JSON. The
// argument is {"url": ..., "options": {...}}; with "again" in it, a socket that was closed is opened anew.

import { createInterface } from "node:readline";
import { Socket } from "engine.io-client";

const tell = event => process.stdout.write(JSON.stringify(event) + "\n");
const { url, options, again } = JSON.parse(process.argv[2]);
let socket;

function open() {
  socket = new Socket(url, options);
  socket.on("open", () => tell({ event: "open", transport: socket.transport.name }));
  socket.on("upgrade", transport => tell({ event: "upgrade", transport: transport.name }));
  // An empty text is nothing at all to this client.
  socket.on("message", (data = "") => tell(
    typeof data === "string" ? { event: "message", text: data } : { event: "message", binary: data.toString("hex") }));
  socket.on("close", reason => {
    if (again) setTimeout(open, 50);
    else { tell({ event: "close", reason }); process.stdin.destroy(); }
  });
}

open();
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  if ("text" in command) socket.send(command.text);
  else if ("binary" in command) socket.send(Buffer.from(command.binary, "hex"));
  else if ("burst" in command) for (let n = 0; n < command.burst; n++) socket.send(String(n));
  else socket.close();
}
