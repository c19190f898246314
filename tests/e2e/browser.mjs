// Chromium for the tests: calls on standard input, their results on standard output, each as one line of JSON.
//
// {"id": 1, "method": "newPage", "args": []} makes a page in a fresh profile and answers with its number;
// {"id": 2, "page": 0, "method": "fill", "args": ["#text", "hello"]} calls Playwright's method of that name.
//
// What a page loads from a CDN of npm packages it gets from node_modules, if the package is there in that version.

import { readFile } from "node:fs/promises";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const browser = await chromium.launch({
  executablePath: process.argv[2],
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const pages = [];
const CDN = /^https:\/\/(?:cdn\.jsdelivr\.net\/npm|unpkg\.com)\/((?:@[^/@]+\/)?[^/@]+)@([^/]+)\/(.+)$/;

async function installed(route) {
  const [, name, version, file] = CDN.exec(route.request().url());
  const folder = new URL(`node_modules/${name}/`, import.meta.url);
  const found = JSON.parse(await readFile(new URL("package.json", folder)).catch(() => "{}")).version;
  if (found !== version) return route.fulfill({ status: 404, body: `${name} ${found} is installed` });
  return route.fulfill({ path: fileURLToPath(new URL(file, folder)) });
}

async function newPage(options) {
  const context = await browser.newContext(options);
  await context.route(CDN, installed);
  const page = await context.newPage();
  page.setDefaultTimeout(10_000);
  page.problems = [];
  page.on("pageerror", error => page.problems.push(String(error)));
  return pages.push(page) - 1;
}

async function call({ page: number, method, args }) {
  if (number === undefined) return newPage(...args);
  const page = pages[number];
  if (method === "problems") return page.problems;
  if (method === "close") return page.context().close();
  const result = await page[method](...args);
  return method === "goto" || method === "waitForFunction" ? null : result;
}

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  call(request).then(
    result => ({ id: request.id, result }), error => ({ id: request.id, error: String(error.message) }),
  ).then(answer => process.stdout.write(JSON.stringify(answer) + "\n"));
}
await browser.close();
