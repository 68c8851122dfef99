"use strict";
// The lineage explorer: search for a prompt, see its candidates, their judgements and its pair.
// Texts come from models. They enter the page by textContent alone, so nothing in them can act on it.

const ROWS = 20;

const byId = (id) => document.getElementById(id);

async function unpack(element) {
  const bytes = Uint8Array.from(atob(element.textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

class Explorer {
  constructor(rows, perPage) {
    this.rows = rows.map((row) => ({ ...row, found: `${row.id} ${row.text}`.toLowerCase() }));
    this.perPage = perPage;
    this.pages = new Map(); // number of a page -> promise of its prompts; the most recently used ones
    this.matches = [];
    this.first = 0; // index in matches of the first row in view
    this.selected = -1; // index in matches
  }

  start() {
    for (const id of ["search", "round", "outcome"]) byId(id).addEventListener("input", () => this.search());
    byId("earlier").addEventListener("click", () => this.turn(-ROWS));
    byId("later").addEventListener("click", () => this.turn(ROWS));
    byId("matches").addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.select(this.first + Number(option.dataset.place));
    });
    byId("matches").addEventListener("keydown", (event) => this.keyInList(event));
    byId("search").addEventListener("keydown", (event) => this.keyInSearch(event));
    document.addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.closest("input, select")) return;
      event.preventDefault();
      byId("search").select(); // so that typing replaces the old query
    });
    this.search();
    this.open(0);
    this.openFromAddress();
    window.addEventListener("hashchange", () => this.openFromAddress());
  }

  search() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const round = byId("round").value;
    const outcome = byId("outcome").value;
    const names = (row, word) => row.found.includes(word) || word.startsWith(`${row.id.toLowerCase()}-`);
    this.matches = this.rows.flatMap((row, place) =>
      (!round || String(row.round) === round) && (!outcome || row.outcome === outcome) && words.every((word) => names(row, word))
        ? [place]
        : [],
    );
    this.first = 0;
    this.selected = -1;
    this.list();
  }

  turn(step) {
    const last = Math.max(0, Math.floor((this.matches.length - 1) / ROWS) * ROWS);
    this.first = Math.min(Math.max(0, this.first + step), last);
    this.list();
  }

  list() {
    const list = byId("matches");
    const shown = this.matches.slice(this.first, this.first + ROWS);
    list.replaceChildren(
      ...shown.map((place, number) => {
        const row = this.rows[place];
        const option = make("div", "match");
        option.id = `match-${number}`;
        option.dataset.place = number;
        option.setAttribute("role", "option");
        option.setAttribute("aria-selected", this.first + number === this.selected);
        const text = make("span", "line", row.text || "(empty)");
        text.dir = "auto";
        option.append(text, make("span", "how", `round ${row.round} · ${row.id} · ${row.outcome}`));
        return option;
      }),
    );
    const inView = this.selected >= this.first && this.selected < this.first + ROWS;
    if (inView) list.setAttribute("aria-activedescendant", `match-${this.selected - this.first}`);
    else list.removeAttribute("aria-activedescendant");
    const number = this.matches.length;
    byId("found").textContent = number
      ? `${(this.first + 1).toLocaleString("en")}–${(this.first + shown.length).toLocaleString("en")} of ${number.toLocaleString("en")}`
      : "nothing found";
    byId("earlier").disabled = this.first === 0;
    byId("later").disabled = this.first + ROWS >= number;
  }

  keyInSearch(event) {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      this.select(0);
      byId("matches").focus();
    } else if (event.key === "Escape") {
      byId("search").value = "";
      this.search();
    }
  }

  keyInList(event) {
    const end = this.matches.length - 1;
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: ROWS, PageUp: -ROWS, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") byId("search").focus();
    else if (event.key in steps) this.select(Math.min(end, Math.max(0, this.selected + steps[event.key])));
    else return;
    event.preventDefault();
  }

  openFromAddress() {
    const id = decodeURIComponent(location.hash).replace(/^#prompt=/, "");
    const place = this.rows.findIndex((row) => row.id === id);
    if (place >= 0 && this.matches[this.selected] !== place) {
      byId("search").value = id;
      byId("round").value = byId("outcome").value = "";
      this.search();
      this.select(this.matches.indexOf(place));
      byId("lineage").scrollIntoView();
    }
  }

  page(number) {
    if (!this.pages.has(number)) {
      if (this.pages.size > 8) this.pages.delete(this.pages.keys().next().value);
      this.pages.set(number, unpack(byId(`page-${number}`)));
    }
    return this.pages.get(number);
  }

  select(place) {
    if (!(place in this.matches)) return;
    this.open(place);
    byId(`match-${place - this.first}`).scrollIntoView({ block: "nearest" });
    history.replaceState(null, "", `#prompt=${encodeURIComponent(this.rows[this.matches[place]].id)}`);
  }

  async open(place) {
    this.selected = place;
    this.first = Math.floor(place / ROWS) * ROWS;
    this.list();
    const number = this.matches[place];
    const prompts = await this.page(Math.floor(number / this.perPage));
    if (this.matches[this.selected] === number) this.show(this.rows[number], prompts[number % this.perPage]);
  }

  show(row, tree) {
    const about = tree.pair ? `${row.outcome} ${tree.pair}` : row.outcome;
    byId("tree").replaceChildren(
      make("p", "how", `Round ${row.round} · prompt ${row.id} · ${about}`),
      this.text("h3", "prompt text", tree.text),
      ...tree.candidates.map((candidate) => this.candidate(candidate)),
    );
  }

  candidate(candidate) {
    const card = make("section", `card ${candidate.role}`);
    const who = make("h4", "who", candidate.role || "candidate");
    who.append(make("span", "", candidate.score === null ? "no score" : `mean score ${candidate.score.toFixed(2)}`));
    card.append(who, this.text("p", "text", candidate.text));
    card.append(make("p", "how", `${candidate.id} · ${candidate.tokens} tokens · ended by ${candidate.finish}`));
    for (const judgement of candidate.judgements) {
      const line = make("div", "judgement");
      line.append(make("b", "", judgement.score === null ? "no score" : String(judgement.score)));
      line.append(this.text("p", "text", judgement.text));
      card.append(line);
    }
    return card;
  }

  text(tag, className, text) {
    const element = make(tag, text.trim() ? className : "quiet", text.trim() ? text : "(empty)");
    element.dir = "auto";
    return element;
  }
}

const index = byId("explorer-index");
if (index) {
  unpack(index).then((rows) => new Explorer(rows, Number(index.dataset.perPage)).start());
}
