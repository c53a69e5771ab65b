// The playground: what is asked for, by the sliders and fields, and the texts that come of it, side by side.
// Whatever a person or a model writes goes into the page as text (textContent), never as markup.

const MOST_WORDS = 1500; // of a text whose words are marked: comparing takes their product
const LONGEST_WORD = 128 * 1024; // bytes of an argument that Linux takes
const SAMPLING = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"];
const $ = (id) => document.getElementById(id);

let about = null; // what /page/about told
let key = ""; // the API key, kept here alone
const strengths = new Map(); // of each adapter, by its name
const turns = []; // the messages of the chat; what answers the last one is in the columns
let columns = []; // the texts that are shown; the last one is the sliders'
let sliders = null;

// --- what is asked for -----------------------------------------------------------------------------------------------

const base = () => about.models.find((model) => !model.parent);
const adapters = () => about.models.filter((model) => model.parent);
const chatting = () => document.querySelector("[name=mode]:checked").value === "chat";
const mixed = () => Object.fromEntries([...strengths].filter(([, strength]) => strength !== 0));
const words = (models) => models.map((model) => model.word); // what they are called on a command line
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

/** The strengths of each text: those that are beside it, then the one that the sliders make. */
function wanted() {
  const chosen = [...$("beside").querySelectorAll("input:checked")].map((box) => box.value);
  const alone = chosen.map((name) => (name === base().id ? {} : { [name]: 1 }));
  const mix = mixed();
  return [...alone.filter((each) => !same(each, mix)), mix];
}

/** How tokens are drawn where a field is empty: an adapter that was tuned on instructions decides. */
function defaults(mix) {
  const own = about.models.find(({ id, sampling }) => Object.hasOwn(mix, id) && !same(sampling, base().sampling));
  return (own ?? base()).sampling;
}

/** The number in a field, or undefined where it is empty. */
const number = (id) => ($(id).value === "" ? undefined : $(id).valueAsNumber);

function sampling() {
  const found = Object.fromEntries(SAMPLING.map((name) => [name, number(name)]));
  return $("greedy").checked ? { ...found, temperature: 0 } : found;
}

function messages() {
  const system = $("system").value;
  return system ? [{ role: "system", content: system }, ...turns] : [...turns];
}

/** The body of a request; what is undefined is left out of its JSON. */
function bodyOf(mix) {
  return {
    model: base().id,
    adapters: Object.keys(mix).length ? mix : undefined,
    ...(chatting() ? { messages: messages() } : { prompt: $("prompt").value }),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
    ...sampling(),
  };
}

const pathOf = (body) => (body.messages ? "/v1/chat/completions" : "/v1/completions");

// --- the same from a command line ------------------------------------------------------------------------------------

/** A word as a POSIX shell takes it. */
const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`);

/** The command that prints the same text: a text after its prompt, a chat's answer in a line of JSON. */
function commandOf(body) {
  const flags = Object.entries(body.adapters ?? {}).map(
    ([name, strength]) => `--adapter=${about.models.find((model) => model.id === name).word}=${strength}`,
  );
  flags.push(`--max-new-tokens=${body.max_tokens}`, `--seed=${body.seed}`);
  for (const name of SAMPLING)
    if (body[name] !== undefined) flags.push(`--${name.replaceAll("_", "-")}=${body[name]}`);
  const command = [about.command, ...flags.map(quoted)].join(" ");
  if (!body.messages) return `${command} ${quoted(`--prompt=${body.prompt}`)}`;
  return `printf '%s\\n' ${quoted(JSON.stringify({ messages: body.messages }))} | ${command} --prompts=/dev/stdin`;
}

function curlOf(body) {
  const secret = about.key ? ' -H "Authorization: Bearer $SERVE_API_KEY"' : "";
  return `curl ${quoted(location.origin + pathOf(body))}${secret} -d ${quoted(JSON.stringify(body))}`;
}

// --- asking the server -----------------------------------------------------------------------------------------------

class Refused extends Error {}
class Gone extends Error {}

/** An answer of the server. Throws Refused with the error's own line, and Gone where there is no server. */
async function ask(path, options = {}) {
  const mine = key;
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Gone();
  }
  if (answer.ok) return answer;
  if (answer.status === 401 && mine === key) askForKey(); // and no other was given since
  const told = await answer.json().catch(() => null);
  throw new Refused(told?.error?.message ?? `the server answers with status ${answer.status}`);
}

/** The events of an answer, as they come. */
async function* events(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const answer = await ask(pathOf(body), { method: "POST", body: JSON.stringify(asked), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Gone();
    });
    if (done) throw new Gone(); // before the line that ends an answer
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      const event = JSON.parse(part.slice("data: ".length));
      if (event.error) throw new Refused(event.error.message);
      yield event;
    }
  }
}

function askForKey() {
  $("key-wrong").textContent = key && "This is not its key.";
  if (!$("key").open) $("key").showModal();
}

// --- one text --------------------------------------------------------------------------------------------------------

/** A text beside others. state: new, making, done, stopped or failed. */
class Column {
  constructor() {
    this.element = $("text").content.cloneNode(true).firstElementChild;
    this.find = (selector) => this.element.querySelector(selector);
    this.mix = this.body = null;
    this.text = "";
    this.find(".copy-text").onclick = () => this.copy(this.text, "copied");
    this.find(".copy-command").onclick = () => this.copyLine(commandOf(this.body));
    this.find(".copy-curl").onclick = () => this.copyLine(curlOf(this.body));
    this.tell("new", "");
  }

  /** Say whose text this is. */
  title(mix) {
    const names = Object.entries(mix).map(([name, strength]) => (strength === 1 ? name : `${name} × ${strength}`));
    this.mix = mix;
    this.find("h3").textContent = names.join(" + ") || base().id;
    this.find(".made").setAttribute("aria-label", `Text of ${this.find("h3").textContent}`);
  }

  /** Make a text, in the place of what was asked for before; what is there or on its way is not asked for again. */
  async make(mix) {
    const body = bodyOf(mix);
    if (same(body, this.body) && (this.state === "making" || this.state === "done")) return;
    this.aborter?.abort();
    const mine = (this.aborter = new AbortController());
    this.title(mix);
    [this.body, this.text] = [body, ""];
    this.find(".made").classList.add("old"); // it stays until the new one begins, so that nothing flickers
    this.find(".copied").hidden = true;
    if (body.messages) this.write();
    this.tell("making", "reading the prompt…");
    try {
      await this.read(body, mine.signal);
    } catch (error) {
      if (mine.signal.aborted) return;
      if (!(error instanceof Refused || error instanceof Gone)) throw error;
      this.tell("failed", error instanceof Gone ? "the server does not answer" : error.message);
      if (error instanceof Gone) lost();
    }
  }

  async read(body, signal) {
    const began = performance.now();
    const seconds = () => `${((performance.now() - began) / 1000).toFixed(1)} s`;
    const clock = setInterval(() => this.count(`${this.find("progress").value} / ${body.max_tokens}, ${seconds()}`), 100);
    let [frame, pieces, tokens, ended] = [0, 0, 0, ""];
    try {
      for await (const { choices, usage } of events(body, signal)) {
        if (signal.aborted) return;
        tokens = usage?.completion_tokens ?? tokens;
        const choice = choices[0];
        const piece = choice?.text ?? choice?.delta?.content ?? "";
        ended = choice?.finish_reason ?? ended;
        if (!piece) continue;
        if (!this.text) this.find(".status").textContent = "making…";
        this.text += piece;
        this.find("progress").value = ++pieces;
        frame ||= requestAnimationFrame(() => {
          frame = 0;
          if (!signal.aborted) this.write();
        });
      }
      this.tell("done", ended === "stop" ? "ended by itself" : "at max tokens");
      markAll();
    } finally {
      cancelAnimationFrame(frame);
      clearInterval(clock);
      if (!signal.aborted) this.count(tokens ? `${tokens} tokens, ${seconds()}` : "");
    }
  }

  stop() {
    if (this.state !== "making") return;
    this.aborter.abort();
    this.count("");
    this.tell("stopped", "stopped");
  }

  write() {
    this.find(".made").classList.remove("old");
    this.find(".made").textContent = this.text;
  }

  /** The text with the words marked that another does not have. */
  mark(other) {
    this.find(".made").classList.remove("old");
    this.find(".made").replaceChildren(
      ...differing(other, this.text).map(({ text, differs }) => {
        const node = document.createElement(differs ? "mark" : "span");
        node.textContent = text;
        return node;
      }),
    );
  }

  count(text) {
    this.find(".count").textContent = text;
  }

  tell(state, status) {
    this.state = state;
    this.element.classList.toggle("failed", state === "failed");
    this.find(".made").setAttribute("aria-busy", state === "making");
    if (state === "failed" || state === "stopped") this.write();
    this.find(".status").textContent = status;
    this.find("progress").style.visibility = state === "making" ? "visible" : "hidden";
    this.find("progress").max = this.body?.max_tokens ?? 1;
    if (state === "making") this.find("progress").value = 0;
    for (const name of ["text", "command", "curl"])
      this.find(`.copy-${name}`).disabled = this.body === null || (name === "text" && state === "new");
    $("stop").disabled = !columns.some((column) => column.state === "making");
  }

  copyLine(line) {
    const long = new TextEncoder().encode(line).length >= LONGEST_WORD;
    return this.copy(line, long ? "copied, but a command line takes 128 KB at most" : "copied");
  }

  /** Copy a text; where the browser does not allow that, show it selected. */
  async copy(text, status) {
    try {
      await navigator.clipboard.writeText(text);
      this.find(".status").textContent = status;
    } catch {
      this.find(".copied").hidden = false;
      this.find(".copied").value = text;
      this.find(".copied").select();
      this.find(".status").textContent = "selected below, to be copied";
    }
  }
}

/** The parts of a text, and whether they are words that the longest common subsequence with another lacks. */
function differing(other, text) {
  const cut = (whole) => whole.match(/\s+|\S+/gu) ?? [];
  const [ours, theirs] = [cut(text), cut(other)];
  if (ours.length > MOST_WORDS || theirs.length > MOST_WORDS) return [{ text, differs: false }];
  const wide = theirs.length + 1;
  const common = new Uint16Array((ours.length + 1) * wide); // of what follows in both
  for (let i = ours.length - 1; i >= 0; i--)
    for (let j = theirs.length - 1; j >= 0; j--)
      common[i * wide + j] =
        ours[i] === theirs[j]
          ? common[(i + 1) * wide + j + 1] + 1
          : Math.max(common[(i + 1) * wide + j], common[i * wide + j + 1]);
  let j = 0;
  return ours.map((word, i) => {
    while (j < theirs.length && ours[i] !== theirs[j] && common[i * wide + j + 1] > common[(i + 1) * wide + j]) j++;
    const same = j < theirs.length && word === theirs[j];
    if (same) j++;
    return { text: word, differs: !same && /\S/u.test(word) };
  });
}

/** Mark words against the base's text, where that is beside the others and all are done. */
function markAll() {
  const plain = columns.find((column) => column.body && !column.body.adapters);
  for (const column of columns) {
    if (column.state !== "done") continue;
    if ($("marks").checked && plain?.state === "done" && column !== plain) column.mark(plain.text);
    else column.write();
  }
}

// --- all texts -------------------------------------------------------------------------------------------------------

/** A column for each of the texts; one that is there with its strengths stays. */
function arrange(mixes) {
  sliders ??= new Column();
  const before = columns;
  const alone = mixes.slice(0, -1);
  columns = [...alone.map((mix) => before.find((one) => one !== sliders && same(one.mix, mix)) ?? new Column()), sliders];
  for (const column of before) if (!columns.includes(column)) column.stop();
  columns.forEach((column, i) => column.state === "new" && column.title(mixes[i]));
  $("texts").replaceChildren(...columns.map((column) => column.element));
}

/** Make what is asked for, as it is asked for now. */
function make() {
  clearTimeout(soon);
  if (!about) return begin();
  if (!valid() || (chatting() && !turns.length)) return;
  const mixes = wanted();
  arrange(mixes);
  columns.forEach((column, i) => column.make(mixes[i]));
}

/** Whether all fields hold what they may. */
function valid() {
  const fields = [...$("sampling").querySelectorAll("input[type=number]")];
  const wrong = fields.filter((field) => {
    field.setAttribute("aria-invalid", !field.checkValidity());
    return !field.checkValidity();
  });
  const label = wrong[0]?.closest("label").firstChild.textContent.trim();
  $("wrong").textContent = wrong.length ? `${label}: ${wrong[0].validationMessage}` : "";
  return !wrong.length;
}

let soon = 0;

/** Make it as soon as a person pauses, where texts are live and there is something to go on. */
function makeSoon(pause) {
  clearTimeout(soon);
  if (!about) return;
  const mix = mixed();
  for (const name of SAMPLING) $(name).placeholder = defaults(mix)[name] ?? "off";
  $("temperature").disabled = $("greedy").checked;
  if ($("live").checked && (chatting() ? turns.length : $("prompt").value)) soon = setTimeout(make, pause);
  else if (columns.every((column) => column.state === "new")) arrange(wanted());
}

function stopAll() {
  clearTimeout(soon);
  for (const column of columns) column.stop();
}

// --- the chat --------------------------------------------------------------------------------------------------------

/** The chat goes on: with the answer that the sliders made, and with what is said to it. */
function send() {
  const content = $("prompt").value;
  const making = turns.length && sliders.state === "making";
  $("wrong").textContent = making ? "The answer is still being made; stop it, or wait." : "";
  if (making) return;
  if (!content.trim()) return make(); // what was stopped, or could not be made
  if (turns.length && sliders.text) turns.push({ role: "assistant", content: sliders.text });
  else turns.pop(); // what got no answer
  turns.push({ role: "user", content });
  $("prompt").value = "";
  showTurns();
  make();
}

/** The last message is taken back, to be written otherwise. */
function takeBack() {
  stopAll();
  $("prompt").value = turns.pop()?.content ?? "";
  if (turns.length) turns.pop(); // the answer, which is made anew
  showTurns();
  if (turns.length) make();
  else restart();
  $("prompt").focus();
}

function showTurns() {
  const shown = turns.map(({ role, content }) => {
    const line = document.createElement("li");
    line.className = role;
    line.dir = "auto";
    line.textContent = content;
    line.setAttribute("aria-label", `${role}: ${content}`);
    return line;
  });
  $("turns").replaceChildren(...shown);
  $("turns").hidden = $("back").hidden = !chatting() || !turns.length;
  $("turns").scrollTop = $("turns").scrollHeight;
}

/** No text is there. */
function restart() {
  stopAll();
  [columns, sliders] = [[], null];
  arrange(wanted());
}

function changeMode() {
  const chat = chatting();
  $("for-system").hidden = !chat;
  $("prompt-name").textContent = chat ? "Message" : "Prompt";
  $("prompt").rows = chat ? 2 : 5;
  $("prompt").placeholder = chat ? "What to say" : "The beginning of a text";
  $("make").textContent = chat ? "Send" : "Generate";
  $("keys").textContent = chat ? "Enter sends, Shift+Enter is a new line, Escape stops" : "Ctrl+Enter makes, Escape stops";
  showTurns();
  restart();
  makeSoon(0);
}

// --- the server ------------------------------------------------------------------------------------------------------

function tellServer(text) {
  if ($("server").textContent !== text) $("server").textContent = text;
}

let away = false;
let looked = 0;
let begun = 0; // how often it was begun; what comes of an earlier time is too late

function lost() {
  away = true;
  tellServer("The server does not answer. This page goes on as soon as it is back.");
  lookSoon();
}

/** Look again whether the server is there; when it is back, all is made that was not. */
function lookSoon() {
  clearTimeout(looked);
  looked = setTimeout(look, away ? 1000 : 5000);
}

async function look() {
  try {
    await ask("/health");
    if (away) await begin();
    lookSoon();
  } catch (error) {
    if (error instanceof Gone) return lost();
    tellServer(error.message);
    lookSoon();
  }
}

/** Learn what the server offers, and begin or go on. */
async function begin() {
  const mine = ++begun;
  let told;
  try {
    told = await (await ask("/page/about")).json();
  } catch (error) {
    if (mine !== begun) return;
    away = error instanceof Gone;
    return away ? lost() : tellServer(error.message);
  }
  if (mine !== begun) return;
  const others = about && !same(words(about.models), words(told.models)); // than those whose texts are shown
  [about, away] = [told, false];
  tellServer("");
  document.title = `${base().id} – Playground`;
  const count = adapters().length;
  $("about").textContent =
    `${base().id}, ${count} adapter${count === 1 ? "" : "s"}, sees ${about.context.toLocaleString("en")} tokens`;
  $("max_tokens").max = about.max_tokens;
  $("max_tokens").value = Math.min(number("max_tokens") ?? 200, about.max_tokens);
  const chat = document.querySelector("[value=chat]");
  chat.disabled = !about.models.some((model) => model.chat);
  chat.parentElement.title = chat.disabled ? "No model here has a chat template" : "";
  showAdapters();
  if (others) restart();
  makeSoon(0);
}

function showAdapters() {
  const first = !strengths.size;
  const names = adapters().map((model) => model.id);
  for (const name of [...strengths.keys()]) if (!names.includes(name)) strengths.delete(name);
  names.forEach((name, i) => strengths.set(name, strengths.get(name) ?? (first && i === 0 ? 1 : 0)));
  $("sliders").replaceChildren(...names.map(slider));
  if (!names.length) $("sliders").textContent = "None was trained on this base.";
  $("beside").hidden = $("for-marks").hidden = !names.length;
  const chosen = first ? [base().id] : [...$("beside").querySelectorAll("input:checked")].map((box) => box.value);
  const boxes = about.models.map(({ id }) => {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", value: id });
    box.checked = chosen.includes(id);
    box.onchange = () => makeSoon(0);
    label.append(box, ` ${id}`);
    return label;
  });
  $("beside").replaceChildren($("beside").querySelector("legend"), ...boxes);
}

function slider(name) {
  const element = $("slider").content.cloneNode(true).firstElementChild;
  const inputs = [...element.querySelectorAll("input")];
  element.querySelector(".name").textContent = name;
  element.setAttribute("aria-label", name);
  for (const input of inputs) {
    input.setAttribute("aria-label", `Strength of ${name}`);
    input.value = strengths.get(name);
    input.oninput = () => {
      if (Number.isNaN(input.valueAsNumber)) return;
      strengths.set(name, input.valueAsNumber);
      for (const other of inputs) if (other !== input) other.value = input.value;
      makeSoon(120);
    };
  }
  return element;
}

// --- what a person does ----------------------------------------------------------------------------------------------

$("asked").onsubmit = (event) => {
  event.preventDefault();
  if (chatting()) send();
  else make();
};
$("prompt").onkeydown = (event) => {
  const sends = event.ctrlKey || event.metaKey || (chatting() && !event.shiftKey);
  if (event.key !== "Enter" || event.isComposing || !sends) return;
  event.preventDefault();
  $("asked").requestSubmit();
};
document.onkeydown = (event) => {
  if (event.key === "Escape" && !$("key").open) stopAll();
};
$("prompt").oninput = () => {
  if (!chatting()) makeSoon(400);
};
$("system").oninput = () => makeSoon(400);
$("sampling").oninput = () => makeSoon(250);
$("live").onchange = () => makeSoon(0);
$("marks").onchange = markAll;
$("stop").onclick = stopAll;
$("back").onclick = takeBack;
$("dice").onclick = () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  makeSoon(0);
};
for (const mode of document.querySelectorAll("[name=mode]")) mode.onchange = changeMode;
$("key").onclose = () => {
  if (!$("secret").value) return; // closed by Escape; the next request asks again
  [key, $("secret").value] = [$("secret").value, ""];
  begin();
};

if (matchMedia("(max-width: 800px)").matches) $("sampling").open = false;
begin();
lookSoon();
