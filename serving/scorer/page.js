"use strict";

// What a user may be told of an answer without their history.
const DEGRADED = {
  unknown_user: "This user is not known",
  no_table: "No user has a table of this model yet",
  store_slow: "The store of tables answered too late",
  store_away: "The store of tables does not answer",
  corrupt_table: "This user's table is damaged",
  foreign_table: "This user's table belongs to another model",
};
const RECENT = 20; // requests of the rolling figure

const $ = (id) => document.getElementById(id);
const spent = [];
let asked = 0; // answers of an earlier question must not overwrite those of a later one

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const named = (thing) => thing.name ?? `item ${thing.item}`;
const percent = (part) => `${(100 * part).toFixed(1)}%`;

function moment(time) {
  return element("time", `${time.slice(0, 16).replace("T", " ")} UTC`, { datetime: time });
}

async function ask(path, body) {
  const options = { headers: {} };
  if (body !== undefined) {
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    options.headers["Content-Type"] = "application/json";
  }
  const token = $("token").value.trim();
  if (token) options.headers.Authorization = `Bearer ${token}`;
  const begun = performance.now();
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is it running? Try again in a moment.");
  }
  if (answer.status === 401) {
    $("token-part").hidden = false;
    $("token").focus();
    throw new Error(token
      ? "This is not the server's token. Type it again and press Enter."
      : "Histories are shown to those with the server's token. Type it and press Enter.");
  }
  const content = read(await answer.text());
  if (!answer.ok) {
    throw new Error(`The server refused (${answer.status}): ${content.error ?? "no reason given"}`);
  }
  clock(path, performance.now() - begun);
  return content;
}

// Items may be integers of 64 bits, which numbers here round: those stay as they were written.
function read(text) {
  const exact = (key, value, { source } = {}) =>
    Number.isInteger(value) && !Number.isSafeInteger(value) && source ? source : value;
  try {
    return JSON.parse(text, exact);
  } catch {
    return {};
  }
}

function clock(path, milliseconds) {
  spent.push(milliseconds);
  if (spent.length > RECENT) spent.shift();
  const sorted = [...spent].sort((a, b) => a - b);
  const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  $("last").textContent = `${milliseconds.toFixed(1)} ms (${path})`;
  $("rolling").textContent =
    `median ${at(0.5).toFixed(1)} ms, slowest ${at(1).toFixed(1)} ms of ${sorted.length}`;
}

function showServed(answer) {
  const { version, digest } = answer.model;
  $("model").textContent = `version ${version}, bundle ${digest.slice(0, 12)}`;
  if ("index" in answer) {
    $("index").textContent = answer.index ? answer.index.slice(0, 12) : "none";
  }
}

function showHistory(user) {
  const version = user.table ? `, this user's written ${user.table.revision} times` : "";
  $("tables").textContent = `fingerprint ${user.model.fingerprint}${version}`;
  const behaviours = user.behaviours ?? [];
  const known = user.table ? `The table holds ${user.table.behaviours} behaviours. ` : "";
  const logged = behaviours.length
    ? `The latest ${behaviours.length} of the log, the newest first:`
    : "The log holds nothing of this user.";
  $("history-note").textContent =
    known + (user.behaviours === null ? "The log cannot be read." : logged);
  $("history").replaceChildren(...behaviours.map((behaviour) => {
    const row = element("li", named(behaviour));
    row.append(moment(behaviour.time));
    return row;
  }));
}

function showCandidates(user, answer) {
  const why = answer.degraded ? `${DEGRADED[answer.degraded] ?? answer.degraded}. ` : "";
  const without = answer.history === "empty" && answer.items.length
    ? "Without a history these are chosen from what is met most. " : "";
  $("candidates-note").textContent = answer.items.length
    ? `${why}${without}The best ${answer.items.length} of ${answer.candidates} retrieved.`
    : `${why}There is nothing to recommend.`;
  $("candidates").replaceChildren(...answer.items.map((candidate) => {
    const button = element("button", undefined, { type: "button", "aria-pressed": "false" });
    button.append(element("span", named(candidate)), element("span", percent(candidate.score)));
    button.addEventListener("click", () => explain(user, candidate, button));
    const row = element("li");
    row.append(button);
    return row;
  }));
}

function showWhy(candidate, answer) {
  const rows = answer.behaviours.map((behaviour) => {
    const row = element("tr");
    const last = element("td");
    last.append(moment(behaviour.time));
    const share = element("td", `${percent(behaviour.share)} `, { class: "number" });
    const value = Math.max(0, behaviour.share);
    share.append(element("meter", undefined, { value, min: 0, max: 1, "aria-hidden": "true" }));
    row.append(
      element("th", named(behaviour), { scope: "row" }),
      last,
      element("td", behaviour.times, { class: "number" }),
      element("td", `${behaviour.shared_groups} of ${answer.groups}`, { class: "number" }),
      share,
    );
    return row;
  });
  $("scores").replaceChildren(
    element("dt", "Score"), element("dd", percent(answer.score)),
    element("dt", "Without history"), element("dd", percent(answer.score_without_history)),
  );
  $("why-note").textContent = note(candidate, answer);
  $("why").hidden = rows.length === 0;
  $("why").tBodies[0].replaceChildren(...rows);
}

function note(candidate, answer) {
  const name = named(candidate);
  if (answer.degraded) return `${name}: scored without a history.`;
  if (answer.groups === 0) return `${name}: this model keeps no table of behaviours.`;
  if (answer.in_log === null) return `${name}: the log of behaviours cannot be read.`;
  if (answer.in_log === 0) return `${name}: the log holds no behaviour of this user.`;
  if (answer.behaviours.length === 0) return `${name}: no behaviour shares a bucket with it.`;
  return `${name}: read from ${answer.in_table} behaviours, of which the log holds ` +
    `${answer.in_log}.`;
}

function clearWhy() {
  $("why-note").textContent = "Choose a candidate.";
  $("scores").replaceChildren();
  $("why").hidden = true;
}

async function attempt(work) {
  const mine = ++asked;
  const current = () => mine === asked;
  $("error").textContent = "";
  document.body.setAttribute("aria-busy", "true");
  try {
    await work(current);
  } catch (error) {
    if (!current()) return;
    $("status").textContent = "";
    $("error").textContent = error.message;
  } finally {
    if (current()) document.body.removeAttribute("aria-busy");
  }
}

function recommend(event) {
  event.preventDefault();
  const user = $("user").value.trim();
  $("status").textContent = `Asking for user ${user}.`;
  return attempt(async (current) => {
    const answer = await ask("v1/recommend", {
      user, exclude_seen: !$("seen").checked, time: new Date().toISOString(),
    });
    const known = await ask(`v1/users/${encodeURIComponent(user)}`);
    if (!current()) return;
    showServed(answer);
    showHistory(known);
    showCandidates(user, answer);
    clearWhy();
    $("status").textContent =
      `User ${user}: ${known.table?.behaviours ?? 0} behaviours, ${answer.items.length} candidates.`;
  });
}

function explain(user, candidate, button) {
  return attempt(async (current) => {
    const answer = await ask("v1/explain", {
      user, item: candidate.item, time: new Date().toISOString(),
    });
    if (!current()) return;
    showServed(answer);
    showWhy(candidate, answer);
    for (const other of $("candidates").querySelectorAll("button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    $("why-title").focus();
    $("status").textContent = `Why ${named(candidate)}.`;
  });
}

$("ask").addEventListener("submit", recommend);
