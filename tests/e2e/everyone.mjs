// The clients of examples/everyone_together.html in Node, for the tests: commands on standard input, events on standard
// output, each as one line of JSON. The argument is {"host": ...}; {"client": ..., "text": ...} has one of them say
// something.

import { createInterface } from "node:readline";
import { Centrifuge } from "centrifuge";
import { Socket } from "engine.io-client";
import { io } from "socket.io-client";
import WebSocket from "ws";

const { host } = JSON.parse(process.argv[2]);
const tell = event => process.stdout.write(JSON.stringify(event) + "\n");
const open = client => tell({ event: "open", client });
const show = client => ({ text }) => tell({ event: "message", client, text });

const socket = new WebSocket(`ws://${host}/room`);
socket.on("open", () => open("websocket"));
socket.on("message", data => show("websocket")(JSON.parse(data)));

// This Node may have no EventSource.
async function readEvents() {
  const response = await fetch(`http://${host}/room`, { headers: { Accept: "text/event-stream" } });
  const decoder = new TextDecoder();
  open("eventsource");
  let text = "";
  for await (const chunk of response.body) {
    const events = (text + decoder.decode(chunk, { stream: true })).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = /^data: (.*)$/m.exec(event);
      if (data) show("eventsource")(JSON.parse(data[1]));
    }
  }
}
readEvents();

const engine = new Socket(`http://${host}`, { path: "/room" });
engine.on("upgrade", () => open("engineio"));
engine.on("message", data => show("engineio")(JSON.parse(data)));

const socketio = io(`http://${host}`);
socketio.on("connect", () => open("socketio"));
socketio.on("message", show("socketio"));

const centrifuge = new Centrifuge(`ws://${host}/live`, { websocket: WebSocket });
centrifuge.on("connected", () => open("centrifuge"));
centrifuge.on("publication", ({ data }) => show("centrifuge")(data));
centrifuge.connect();

const say = {
  websocket: text => socket.send(text),
  eventsource: text => fetch(`http://${host}/room/messages`, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ text }),
  }),
  engineio: text => engine.send(text),
  socketio: text => socketio.emit("say", text),
  centrifuge: text => centrifuge.rpc("say", text),
};

for await (const line of createInterface({ input: process.stdin })) {
  const { client, text } = JSON.parse(line);
  say[client](text);
}
process.exit();
