// A `centrifuge` client for the tests: commands on standard input, answers and events on standard output, each as one
// line of JSON. The argument is {"endpoint": ..., "options": {...}, "tokens": [...]}; of the tokens one is given out
// each time that the client asks for one.

import { createInterface } from "node:readline";
import WebSocket from "ws";
import { Centrifuge } from "centrifuge";

// What the browser has and this Node may not: as much of it as is needed here.
class EventSource {
  constructor(url) {
    this.controller = new AbortController();
    this.read(url).catch(() => this.onerror && !this.controller.signal.aborted && this.onerror({}));
  }
  async read(url) {
    const response = await fetch(url, { headers: { Accept: "text/event-stream" }, signal: this.controller.signal });
    if (response.status !== 200) throw new Error(`status ${response.status}`);
    if (!response.headers.get("content-type").startsWith("text/event-stream")) throw new Error("not an event stream");
    this.onopen?.({});
    const decoder = new TextDecoder();
    let rest = "";
    for await (const chunk of response.body) {
      rest += decoder.decode(chunk, { stream: true });
      const events = rest.split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter(line => line.startsWith("data: ")).map(line => line.slice(6));
        if (lines.length) this.onmessage?.({ data: lines.join("\n") });
      }
    }
    throw new Error("the stream has ended");
  }
  close() { this.controller.abort(); }
  addEventListener(name, listener) { this[`on${name}`] = listener; }
}

const { endpoint, options, tokens } = JSON.parse(process.argv[2]);
const tell = event => process.stdout.write(JSON.stringify(event) + "\n");
const nextToken = () => { tell({ event: "token" }); return Promise.resolve(tokens.shift() ?? ""); };
const info = value => value && { user: value.user, client: value.client, info: value.connInfo ?? null };
const said = {
  connecting: ({ code, reason }) => ({ code, reason }),
  connected: ({ client, data, transport }) => ({ client, data, transport }),
  disconnected: ({ code, reason }) => ({ code, reason }),
  subscribing: ({ code, reason }) => ({ code, reason }),
  subscribed: ({ recoverable, positioned, wasRecovering, recovered, streamPosition, data }) =>
    ({ recoverable, positioned, wasRecovering, recovered, streamPosition, data }),
  unsubscribed: ({ code, reason }) => ({ code, reason }),
  publication: ({ data, offset, tags, info: by }) => ({ data, offset, tags, info: info(by) ?? null }),
  join: ({ info: who }) => info(who),
  leave: ({ info: who }) => info(who),
  message: ({ data }) => ({ data }),
  error: ({ error, type }) => ({ code: error.code, message: error.message, type }),
};
const listen = (emitter, names, prefix = "", channel = undefined) => {
  for (const name of names) emitter.on(name, context => tell(
    { event: prefix + name, channel: channel ?? context.channel, ...said[name](context) }));
};

if (tokens) options.getToken = nextToken;
const client = new Centrifuge(endpoint, { websocket: WebSocket, fetch, readableStream: ReadableStream,
  eventsource: EventSource, minReconnectDelay: 50, maxReconnectDelay: 200, ...options });
listen(client, ["connecting", "connected", "disconnected", "message", "error"]);
listen(client, ["subscribed", "unsubscribed", "publication", "join", "leave"], "server ");

const act = {
  connect: () => client.connect(),
  disconnect: () => client.disconnect(),
  subscribe: ({ channel, tokens, state, ...options }) => {
    if (tokens) options.getToken = () => Promise.resolve(tokens.shift() ?? "");
    if (state) options.getState = () => { tell({ event: "state", channel }); return Promise.resolve(state); };
    const subscription = client.getSubscription(channel) ??
      client.newSubscription(channel, { minResubscribeDelay: 50, maxResubscribeDelay: 200, ...options });
    if (!subscription.listensAlready) {
      listen(subscription, ["subscribing", "subscribed", "unsubscribed", "publication", "join", "leave", "error"],
        "", channel);
      subscription.listensAlready = true;
    }
    subscription.subscribe();
  },
  unsubscribe: ({ channel }) => client.getSubscription(channel).unsubscribe(),
  publish: ({ channel, data }) => client.publish(channel, data),
  rpc: ({ method, data }) => client.rpc(method, data).then(({ data }) => ({ data, size: data?.length })),
  send: ({ data }) => client.send(data),
  history: ({ channel, ...options }) => client.history(channel, options).then(({ publications, offset, epoch }) =>
    ({ publications: publications.map(({ data, offset }) => ({ data, offset })), offset, epoch })),
  presence: ({ channel }) => client.presence(channel).then(({ clients }) =>
    Object.fromEntries(Object.entries(clients).map(([id, who]) => [id, info(who)]))),
  presence_stats: ({ channel }) => client.presenceStats(channel).then(({ numClients, numUsers }) =>
    ({ num_clients: numClients, num_users: numUsers })),
  batch: ({ commands }) => {
    client.startBatching();
    const all = commands.map(command => act[command.do](command));
    client.stopBatching();
    return Promise.all(all);
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  const number = command.number;
  delete command.number;
  const name = command.do;
  delete command.do;
  Promise.resolve().then(() => act[name](command)).then(
    result => tell({ event: "answer", number, result: result ?? null }),
    error => tell({ event: "answer", number, error: { code: error.code, message: error.message, temporary: !!error.temporary } }));
}
client.disconnect();
process.exit(0);
