// The page of `anser serve` in a real browser: ANSER is the program, CHROMIUM the browser. `tools/page-test` runs this.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { after, afterEach, before, beforeEach, test } from "node:test";
import { chromium } from "playwright-core";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const DESKTOP = { width: 1200, height: 800 };
const PHONE = { width: 360, height: 740 };

let server, base, browser, context, page;
let strangers, faults;

before(async () => {
  server = spawn(process.env.ANSER, ["serve", "--port", "0", "--json", "--device", "cpu", "--quiet"], { stdio: ["ignore", "pipe", "inherit"] });
  for await (const line of createInterface({ input: server.stdout })) {
    base = `http://${JSON.parse(line).address}`;
    break;
  }
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
});

after(async () => {
  await browser?.close();
  server.kill("SIGINT");
});

beforeEach(() => open({ viewport: DESKTOP }));

afterEach(async () => {
  await context.close();
  assert.deepEqual(strangers, [], "the page asks nobody but its server");
  assert.deepEqual(faults, [], "no errors in the console");
  for (const { id } of (await (await fetch(`${base}/v1/states`)).json()).data) {
    await fetch(`${base}/v1/states/${id}`, { method: "DELETE" });
  }
});

async function open(options) {
  await context?.close();
  [strangers, faults] = [[], []];
  context = await browser.newContext(options);
  page = await context.newPage();
  page.setDefaultTimeout(20_000);
  page.on("request", (r) => r.url().startsWith(`${base}/`) || r.url().startsWith("data:") || strangers.push(r.url()));
  page.on("pageerror", (e) => faults.push(String(e)));
  page.on("console", (m) => m.type() === "error" && faults.push(m.text()));
  await page.goto(base);
  await page.getByRole("heading", { name: "anser-12m" }).waitFor();
}

const message = () => page.getByRole("textbox", { name: "Message" });
const status = () => page.getByRole("status");
const replies = () => page.locator("article.assistant .said");
const setting = (name) => page.getByLabel(name, { exact: true });

async function say(text) {
  await message().fill(text);
  await message().press("Enter");
}

async function answered() {
  await page.getByRole("button", { name: "Send" }).waitFor();
  await status().filter({ hasText: "written" }).waitFor();
}

/** The next answer is this text, in pieces. */
async function answers(text) {
  const pieces = text.match(/[^]{1,7}/g).map((content) => ({ choices: [{ delta: { content } }] }));
  const body = pieces.map((p) => `data: ${JSON.stringify(p)}\n\n`).join("") + "data: [DONE]\n\n";
  await page.route("**/v1/chat/completions", (route) => route.fulfill({ contentType: "text/event-stream", body }), { times: 1 });
  await say("Say it");
  await page.getByRole("button", { name: "Send" }).waitFor();
}

async function accessible(what) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => globalThis.axe.run());
  assert.deepEqual(violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html).join(" ")}`), [], what);
}

async function running() {
  const text = await (await fetch(`${base}/metrics`)).text();
  return Number(text.match(/^anser_requests_running (\d+)/m)[1]);
}

async function until(what, condition) {
  for (let i = 0; i < 200; i++) {
    if (await condition()) return;
    await new Promise((done) => setTimeout(done, 50));
  }
  assert.fail(`waited for ${what}`);
}

test("an answer comes as it is written", async () => {
  await setting("Tokens at most").fill("200");
  await setting("Temperature").fill("0");
  await page.evaluate(() => {
    globalThis.lengths = new Set();
    const note = () => globalThis.lengths.add(document.querySelector("article.assistant .said")?.textContent.length);
    new MutationObserver(note).observe(document.getElementById("talk"), { childList: true, subtree: true });
  });
  await say("Tell me of the whale.");
  await answered();
  const lengths = await page.evaluate(() => [...globalThis.lengths]);
  assert.ok(lengths.length > 5, `it was seen to grow: ${lengths}`);
  assert.match(await status().textContent(), /tokens read \(\d+ cached\), \d+ written/);
  assert.match(await page.locator("#speed").textContent(), /tokens\/s · [\d.]+ MiB of states/);
  // A second turn knows the first: its prompt is longer, and the first part of it was read before.
  await say("Why?");
  await answered();
  assert.equal(await replies().count(), 2);
  assert.ok(Number((await status().textContent()).match(/\((\d+) cached/)[1]) > 0);
});

test("Markdown becomes elements, and never a script", async () => {
  await answers(
    "# Title\n\nSome **bold** and `inline` text.\n\n```rust\nfn main() {\n    let x = 1 < 2;\n}\n```\n\n- one\n- two\n\n" +
      "1. first\n\n> said\n\n[link](https://example.org/) [bad](javascript:alert(1)) <img src=x onerror=alert(1)> <script>alert(1)</script>",
  );
  const reply = replies();
  assert.equal(await reply.getByRole("heading", { name: "Title" }).count(), 1);
  assert.equal(await reply.locator("strong").textContent(), "bold");
  assert.equal(await reply.locator("p code").textContent(), "inline");
  assert.equal(await reply.locator("pre code").textContent(), "fn main() {\n    let x = 1 < 2;\n}");
  assert.deepEqual(await reply.locator("ul li").allTextContents(), ["one", "two"]);
  assert.equal(await reply.locator("blockquote").textContent(), "said");
  assert.deepEqual(await reply.locator("a").evaluateAll((all) => all.map((a) => a.href)), ["https://example.org/"]);
  assert.equal(await reply.locator("img, script").count(), 0);
  assert.match(await reply.textContent(), /<img src=x onerror=alert\(1\)>/);
  await accessible("Markdown");
});

test("settings are what is asked for", async () => {
  await setting("Tokens at most").fill("8");
  await setting("Temperature").fill("0.5");
  await setting("Top-p").fill("0.9");
  await setting("Seed (empty: any)").fill("7");
  await setting("System prompt").fill("Be brief.");
  await page.getByLabel("Thinking").selectOption("off");
  const asked = page.waitForRequest("**/v1/chat/completions");
  await say("Hello");
  const body = (await asked).postDataJSON();
  assert.deepEqual(
    [body.max_tokens, body.temperature, body.top_p, body.seed, body.think, body.messages[0]],
    [8, 0.5, 0.9, 7, "off", { role: "system", content: "Be brief." }],
  );
  await answered();
  const first = await replies().first().textContent();
  assert.match(await status().textContent(), /\d written/);
  await page.getByRole("button", { name: "New chat" }).click();
  assert.equal(await replies().count(), 0);
  await say("Hello");
  await answered();
  assert.equal(await replies().first().textContent(), first, "the same seed, the same answer");
});

test("what is wrong is said", async () => {
  await setting("Temperature").fill("9");
  await say("Hello");
  await status().filter({ hasText: "temperature" }).waitFor();
  assert.equal(await message().inputValue(), "Hello", "nothing typed is lost");
  assert.equal(await replies().count(), 0);
  // The browser reports the refusal itself.
  faults = faults.filter((f) => !f.includes("400"));
});

test("an answer can be stopped", async () => {
  await setting("Tokens at most").fill("4000");
  await page.route("**/v1/chat/completions", (route) => {
    route.continue({ postData: JSON.stringify({ ...route.request().postDataJSON(), ignore_eos: true }) });
  });
  await say("Count to a million.");
  await until("some text", async () => ((await replies().textContent()) ?? "").length > 20);
  await page.getByRole("button", { name: "Stop" }).click();
  await status().filter({ hasText: "Stopped" }).waitFor();
  assert.ok((await replies().textContent()).length > 20, "what was written stays");
  await until("the server's rest", async () => (await running()) === 0);
});

test("conversations are saved, branched, resumed and deleted", async () => {
  await setting("Tokens at most").fill("10");
  await setting("Temperature").fill("0");
  await setting("Name of this chat").fill("talk");
  await say("Who are you?");
  await answered();
  const names = () => page.locator("#states li span");
  await names().filter({ hasText: /^talk \(\d+ tokens\)$/ }).waitFor();

  page.once("dialog", (d) => d.accept("other"));
  await page.getByRole("button", { name: "Branch talk" }).click();
  await names().nth(1).waitFor();
  assert.deepEqual((await names().allTextContents()).map((t) => t.split(" ")[0]), ["other", "talk"]);

  // Another page goes on from it: it sends the new message only, and the server reads no more than that.
  await open({ viewport: DESKTOP });
  await setting("Tokens at most").fill("10");
  await setting("Temperature").fill("0");
  await page.getByRole("button", { name: "Resume talk" }).click();
  const asked = page.waitForRequest("**/v1/chat/completions");
  await say("Why?");
  const body = (await asked).postDataJSON();
  assert.deepEqual([body.state, body.save_as, body.messages], ["talk", "talk", [{ role: "user", content: "Why?" }]]);
  await answered();
  const resumed = await replies().textContent();
  await page.getByRole("button", { name: "Resume other" }).click();
  await say("Why?");
  await answered();
  assert.equal(await replies().textContent(), resumed, "both go on from the same");

  page.once("dialog", (d) => d.accept());
  await page.getByRole("button", { name: "Delete other" }).click();
  await page.getByRole("button", { name: "Delete other" }).waitFor({ state: "detached" });
  assert.equal(await names().count(), 1);
});

test("the keyboard is enough", async () => {
  await page.evaluate(() => document.activeElement.blur());
  const focused = () => page.evaluate(() => {
    const at = document.activeElement;
    const { outlineStyle, outlineWidth } = getComputedStyle(at);
    return { id: at.id || at.className || at.tagName, seen: outlineStyle !== "none" && outlineWidth !== "0px" };
  });
  // Everything that can be used is reached, and is seen to be.
  const wanted = await page.evaluate(() =>
    [...document.querySelectorAll("a[href], button, input, select, textarea, [tabindex='0']")]
      .filter((e) => e.checkVisibility() && !e.disabled)
      .map((e) => e.id || e.className || e.tagName));
  const reached = new Set();
  for (let i = 0; i <= wanted.length; i++) {
    await page.keyboard.press("Tab");
    const { id, seen } = await focused();
    // Once around, the browser's own controls have it.
    if (id === "BODY") continue;
    assert.ok(seen, `${id} shows that it has the focus`);
    reached.add(id);
  }
  assert.deepEqual(reached, new Set(wanted));

  await page.locator(".skip").focus();
  await page.keyboard.press("Enter");
  assert.equal((await focused()).id, "message");
  await page.keyboard.type("One");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("Two");
  assert.equal(await message().inputValue(), "One\nTwo");
  await page.keyboard.press("Enter");
  await page.getByRole("button", { name: "Stop" }).waitFor();
  await page.keyboard.press("Tab");
  assert.equal((await focused()).id, "stop");
  await until("some text", async () => ((await replies().textContent()) ?? "").length > 0);
  await page.keyboard.press("Enter");
  await page.getByRole("button", { name: "Send" }).waitFor();
  assert.equal((await focused()).id, "message", "the next message can be typed at once");
});

test("a phone is wide enough", async () => {
  await open({ viewport: PHONE, hasTouch: true, isMobile: true });
  const fits = () => page.evaluate(() => document.documentElement.scrollWidth <= document.documentElement.clientWidth);
  await answers(`A long word ${"x".repeat(200)} and code:\n\n\`\`\`\n${"y".repeat(200)}\n\`\`\``);
  assert.ok(await fits(), "nothing sticks out");
  assert.ok(await message().isVisible());
  await accessible("a phone");
  const toggle = page.getByRole("button", { name: "Settings" });
  assert.equal(await toggle.getAttribute("aria-expanded"), "false");
  assert.ok(!(await setting("Temperature").isVisible()));
  await toggle.tap();
  assert.equal(await toggle.getAttribute("aria-expanded"), "true");
  assert.ok(await setting("Temperature").isVisible());
  assert.ok(await fits(), "settings neither");
  await accessible("settings on a phone");
  await toggle.tap();
  assert.ok(await message().isVisible());
});

for (const colorScheme of ["light", "dark"]) {
  test(`nobody is left out: ${colorScheme}`, async () => {
    await open({ viewport: DESKTOP, colorScheme });
    await accessible("an empty page");
    await setting("Tokens at most").fill("10");
    await setting("Name of this chat").fill("talk");
    await say("Hello");
    await answered();
    await page.locator("#states li").waitFor();
    await accessible("a conversation");
    await setting("Name of this chat").fill("");
    await setting("Temperature").fill("9");
    await say("Hello");
    await status().filter({ hasText: "temperature" }).waitFor();
    await accessible("an error");
    faults = faults.filter((f) => !f.includes("400"));
  });
}
