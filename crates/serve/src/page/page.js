import { show } from "./markdown.js";

const $ = (id) => document.getElementById(id);
let messages = [];
let keptAs = null; // The state that holds what was said so far.
let running = null;

async function api(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const response = await fetch(path, { ...options, headers });
  if (!response.ok) {
    const said = await response.json().catch(() => null);
    throw new Error(said?.error?.message ?? `${response.status} ${response.statusText}`);
  }
  return response;
}

function status(text, error = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", error);
}

function turn(role) {
  const article = document.createElement("article");
  article.className = role;
  const name = document.createElement("h2");
  name.textContent = role === "user" ? "You" : "Model";
  const thoughts = document.createElement("details");
  thoughts.hidden = true;
  const summary = document.createElement("summary");
  summary.textContent = "Thoughts";
  const inner = document.createElement("div");
  thoughts.append(summary, inner);
  const said = document.createElement("div");
  said.className = "said";
  article.append(name, thoughts, said);
  $("talk").append(article);
  return { article, thoughts, inner, said };
}

function request(text) {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const body = {
    stream: true,
    stream_options: { include_usage: true },
    sampler_order: "rwkv",
    penalty_decay: 0.996,
    think: $("think").value || undefined,
  };
  for (const id of ["temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "max_tokens", "seed"]) body[id] = number(id);
  const name = $("name").value.trim();
  if (name) body.save_as = name;
  const said = { role: "user", content: text };
  if (keptAs) {
    body.state = keptAs;
    body.messages = [said];
  } else {
    const system = $("system").value.trim();
    body.messages = [...(system ? [{ role: "system", content: system }] : []), ...messages, said];
  }
  return body;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function answer(text) {
  const shown = turn("user");
  shown.said.textContent = text;
  const reply = turn("assistant");
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  $("talk").setAttribute("aria-busy", "true");
  status("Reading");
  let content = "", thoughts = "", pieces = 0, first = 0, finish = "", usage = null, pending = false;
  const draw = () => {
    pending = false;
    const talk = $("talk");
    const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
    show(reply.said, content);
    reply.thoughts.hidden = !thoughts;
    reply.inner.textContent = thoughts;
    if (atEnd) talk.scrollTop = talk.scrollHeight;
  };
  try {
    const body = request(text);
    const response = await api("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: running.signal });
    for await (const event of events(response)) {
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      finish = choice.finish_reason ?? finish;
      const { content: more, reasoning_content: thought } = choice.delta;
      if (!more && !thought) continue;
      if (!pieces++) { first = performance.now(); status("Writing"); }
      content += more ?? "";
      thoughts += thought ?? "";
      if (!pending) { pending = true; requestAnimationFrame(draw); }
      const seconds = (performance.now() - first) / 1000;
      if (seconds > 0.2) $("speed").textContent = `${(pieces / seconds).toFixed(1)} pieces/s`;
    }
    if (usage && first) {
      // Time counts from the first token on.
      const speed = (usage.completion_tokens - 1) / ((performance.now() - first) / 1000);
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      $("speed").textContent = `${speed.toFixed(1)} tokens/s`;
      status(`${usage.prompt_tokens} tokens read (${cached} cached), ${usage.completion_tokens} written${finish === "length" ? ": the limit" : ""}`);
    }
    keptAs = body.save_as ?? null;
    messages.push({ role: "user", content: text }, { role: "assistant", content });
  } catch (e) {
    if (e.name === "AbortError") {
      // What was written counts, as the model would see it; a state does not have it.
      status(keptAs || $("name").value ? "Stopped: the kept state is that before this message" : "Stopped");
      if (!keptAs) messages.push({ role: "user", content: text }, { role: "assistant", content });
    } else {
      status(e.message, true);
      shown.article.remove();
      reply.article.remove();
      $("message").value = text;
    }
  }
  draw();
  running = null;
  $("talk").removeAttribute("aria-busy");
  $("send").hidden = false;
  $("stop").hidden = true;
  $("message").focus();
  await Promise.all([states(), memory()]);
}

async function memory() {
  try {
    const text = await (await api("metrics")).text();
    const value = (name) => Number(text.match(new RegExp(`^anser_${name}(?:_total)? (\\S+)`, "m"))?.[1] ?? 0);
    const mib = (bytes) => (bytes / 2 ** 20).toFixed(1);
    $("speed").title = `${value("requests_running")} running; ${value("states_cached")} states in memory`;
    const speed = $("speed").textContent.split(" · ")[0];
    $("speed").textContent = `${speed ? `${speed} · ` : ""}${mib(value("state_bytes_running") + value("state_bytes_cached"))} MiB of states`;
  } catch { /* The next answer says what is wrong. */ }
}

function button(text, label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", () => act().catch((e) => status(e.message, true)));
  return made;
}

async function states() {
  const { data } = await (await api("v1/states")).json();
  // An initial state cannot be resumed under its own name.
  $("states").replaceChildren(...data.filter(({ initial }) => !initial).map(({ id, tokens }) => {
    const item = document.createElement("li");
    const name = document.createElement("span");
    name.textContent = `${id} (${tokens} tokens)`;
    const path = `v1/states/${encodeURIComponent(id)}`;
    item.append(
      name,
      button("Resume", `Resume ${id}`, async () => resume(id)),
      button("Branch", `Branch ${id}`, async () => {
        const to = prompt(`A second name for ${id}:`, `${id}-2`);
        if (!to) return;
        await api(`${path}/branch`, { method: "POST", body: JSON.stringify({ to }) });
        resume(to);
        await states();
      }),
      button("Delete", `Delete ${id}`, async () => {
        if (!confirm(`Delete the state ${id}?`)) return;
        await api(path, { method: "DELETE" });
        if (keptAs === id) keptAs = null;
        await states();
      }),
    );
    return item;
  }));
}

function fresh() {
  running?.abort();
  messages = [];
  keptAs = null;
  $("talk").replaceChildren();
}

function resume(name) {
  fresh();
  keptAs = name;
  $("name").value = name;
  status(`Goes on from ${name}: the model knows what was said, this page doesn't`);
  document.body.classList.remove("open");
  $("message").focus();
}

$("form").addEventListener("submit", (e) => {
  e.preventDefault();
  const text = $("message").value.trim();
  if (!text || running || !$("name").reportValidity()) return;
  $("message").value = "";
  answer(text);
});
$("message").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
    e.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  fresh();
  $("name").value = "";
  status("");
  $("message").focus();
});
$("toggle").addEventListener("click", () => {
  const open = document.body.classList.toggle("open");
  $("toggle").setAttribute("aria-expanded", String(open));
});
$("key").addEventListener("change", begin);

async function begin() {
  try {
    $("model").textContent = (await (await api("v1/models")).json()).data[0].id;
    await Promise.all([states(), memory()]);
    status("");
  } catch (e) {
    status(e.message, true);
  }
}
begin();
$("message").focus();
