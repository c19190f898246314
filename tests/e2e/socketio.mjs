// Clients of the `socket.io-client` package for the tests: commands on standard input, events on standard output, each
// as one line of JSON, in which binary values are {"$hex": "..."}.

import { createInterface } from "node:readline";
import { Manager } from "socket.io-client";

const toJson = value => JSON.stringify(value, function (key) {
  const item = this[key];
  return item instanceof Uint8Array ? { $hex: Buffer.from(item).toString("hex") } : item;
});
const tell = event => process.stdout.write(toJson(event) + "\n");
const managers = new Map(), sockets = new Map();

const commands = {
  open({ name, manager, url, options, namespace, auth }) {
    if (!managers.has(manager)) managers.set(manager, new Manager(url, { reconnectionDelay: 50, ...options }));
    const io = managers.get(manager);
    const socket = io.socket(namespace, { auth });
    sockets.set(name, socket);
    const said = event => tell({ socket: name, ...event });
    socket.on("connect", () => said({
      event: "connect", id: socket.id, recovered: socket.recovered, transport: io.engine.transport.name }));
    socket.on("disconnect", reason => said({ event: "disconnect", reason }));
    socket.on("connect_error", ({ message, data }) => said({ event: "connect_error", message, data }));
    socket.onAny((event, ...args) => {
      const answer = typeof args.at(-1) === "function" ? args.pop() : undefined;
      said({ event: "event", args: [event, ...args] });
      if (event !== "never") answer?.(...args);
    });
    io.on("open", () => io.engine.on("upgrade", () => said({ event: "upgrade" })));
  },
  emit({ name, args, ack }) {
    const answer = (...values) => tell({ socket: name, event: "ack", args: values });
    sockets.get(name).emit(...args, ...ack ? [answer] : []);
  },
  disconnect: ({ name }) => sockets.get(name).disconnect(),
  connect: ({ name }) => sockets.get(name).connect(),
  cut: ({ name }) => sockets.get(name).io.engine.close(),
};

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line, (key, value) => value?.$hex === undefined ? value : Buffer.from(value.$hex, "hex"));
  commands[command.do](command);
}
process.exit();
