"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const sum = xs => xs.reduce((a, b) => a + b, 0), mean = xs => sum(xs) / xs.length;

// --- arithmetic, as in losses.py. A policy is a table of logits, h[position][token]; a row is { tokens, r }, r = +1 or -1.

function logSoftmax(h) {
  const top = Math.max(...h), z = top + Math.log(sum(h.map(x => Math.exp(x - top))));
  return h.map(x => x - z);
}
function softmax(h) { return logSoftmax(h).map(Math.exp); }
function futureLogits(h, ref, lam) { return h.map((some, t) => some.map((x, k) => x + lam * (x - ref[t][k]))); }
function logpSum(h, row) { return sum(row.tokens.map((k, t) => logSoftmax(h[t])[k])); }
function piBar(h, row) { return Math.exp(logpSum(h, row) / row.tokens.length); }

// C |y|, the weight of grad logp_mean, of a row
const WEIGHTS = {
  off_rl: (h, ref, row) => piBar(h, row),
  fpa: (h, ref, row, lam) => piBar(futureLogits(h, ref, lam), row),
  topr: (h, ref, row) => row.r > 0 ? 1 : Math.min(1, Math.exp(logpSum(h, row) - logpSum(ref, row))),
  constant: (h, ref, row) => row.r > 0 ? piBar(h, row) : 0.25,
};
const NAMES = data.names; // of the losses that WEIGHTS has

// a step of gradient descent on the mean over rows of -r C logp_sum, C without gradient
function step(loss, h, ref, rows, lam, lr) {
  const next = h.map(some => [...some]);
  for (const row of rows) {
    const c = WEIGHTS[loss](h, ref, row, lam) / row.tokens.length;
    row.tokens.forEach((k, t) => softmax(h[t]).forEach((p, j) => {
      next[t][j] += lr * row.r * c * ((j === k) - p) / rows.length;
    }));
  }
  return next;
}

// --- state: it lives in the address behind #; what is not there, or is no good, is the default

const STEPS = 200, HOLD = 0.5, SHARED = 0.8;
const RANGES = { // name: [default, least, most]
  lam: [2, 0, 10], wrong: [2, 1, 4], start: [0.05, 0.02, 0.5], t: [0, 0, STEPS], set: [0, 0, data.sets.length - 1],
  side: [0, 0, 1], token: [-1, -1, 999], // -1: the one that lost most
};
function rangeOf(name, set) { // a set of runs has its own steps and pairs
  if (name === "step") return [data.sets[set].steps.length - 1, 0, data.sets[set].steps.length - 1];
  if (name === "pair") return [Math.floor(data.hit * data.sets[set].pairs.length), 0, data.sets[set].pairs.length - 1];
  return RANGES[name];
}
const NUMBERS = [...Object.keys(RANGES), "step", "pair"]; // after the set
const WHOLE = ["wrong", "t", "set", "step", "pair", "side", "token"];
const TITLES = { bandit: "Bandit", two: "Two tokens", real: "Real tokens", claims: "Claims" };
const CARDS = data.claims.cards;
const WORDS = { // name: the default, and what else it may be
  at: Object.keys(TITLES), by: ["fpa", "off_rl"], guess: ["", ...Object.keys(NAMES)],
  verdict: ["", ...CARDS.map(card => card.verdict)], open: ["", ...CARDS.map(card => card.id)],
};
const LISTS = { pi: [-0.1, 0.3, 0.6, -0.8], ref: [-0.35, 0.75, 0.35, -0.75] };
const RIGHT = "1000";
let state = {};

function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = { right: /^[01]{4}$/.test(given.get("right")) ? given.get("right") : RIGHT };
  for (const name of NUMBERS) {
    const [usual, least, most] = rangeOf(name, found.set);
    const value = given.has(name) ? Number(given.get(name)) : NaN;
    found[name] = Number.isFinite(value) ? Math.min(most, Math.max(least, value)) : usual;
    if (WHOLE.includes(name)) found[name] = Math.round(found[name]);
  }
  for (const [name, words] of Object.entries(WORDS)) found[name] = words.includes(given.get(name)) ? given.get(name) : words[0];
  for (const [name, usual] of Object.entries(LISTS)) {
    const list = (given.get(name) || "").split(",").map(Number);
    found[name] = list.length === usual.length && list.every(x => Math.abs(x) <= 30) ? list : [...usual];
  }
  return found;
}
function usual(name) {
  const range = rangeOf(name, state.set);
  return String(name === "right" ? RIGHT : range ? range[0] : (LISTS[name] || WORDS[name][0]));
}
let waiting;
function write() { // at most a few times a second, which browsers ask for
  waiting ??= setTimeout(() => {
    waiting = undefined;
    const kept = Object.entries(state).map(([name, x]) => [name, Array.isArray(x) ? x.map(v => +v.toFixed(3)) : x]);
    const words = kept.filter(([name, x]) => String(x) !== usual(name)).map(([name, x]) => `${name}=${x}`).join("&");
    history.replaceState(null, "", "#" + words);
  }, 250);
}
function set(changes, draw) {
  Object.assign(state, changes);
  draw();
  write();
}

// --- what the parts share

const f2 = x => x.toFixed(2);
const f3 = x => x >= 0.001 || x === 0 ? x.toFixed(3) : x.toExponential(0);
const escaped = text => text.replace(/[&<>"]/g, c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function player(button, words, ms, tick, begin = () => {}) { // tick returns whether to go on
  let timer;
  const stop = () => { clearInterval(timer); timer = undefined; button.textContent = "▶ " + words; };
  const go = () => { stop(); begin(); timer = setInterval(() => tick() || stop(), ms); button.textContent = "❚❚ Pause"; };
  button.addEventListener("click", () => timer ? stop() : go());
  return { go, stop };
}
function choose(box, names, chosen, pick) { // a row of buttons, of which one is pressed; the first call makes them
  if (!box.children.length) {
    const button = ([key, name]) => `<button data-key="${escaped(key)}">${escaped(name)}</button>`;
    box.innerHTML = Object.entries(names).map(button).join("");
    for (const button of box.children) button.addEventListener("click", () => pick(button.dataset.key));
  }
  for (const button of box.children) button.setAttribute("aria-pressed", button.dataset.key === chosen);
}
function slider(name, draw) { $(name).addEventListener("input", () => set({ [name]: Number($(name).value) }, draw)); }
function show(name, words) { // a slider and what is written beside it
  $(name).value = state[name];
  $(name + "-is").textContent = words;
  $(name).setAttribute("aria-valuetext", words);
}

// lines [{ x, y, colour, dash }] on axes; the cursor and the goal are a vertical and a horizontal line
function chart(box, { lines, xs, ys, cursor, goal, height = 150, label }) {
  const width = Math.max(box.clientWidth, 100), left = 34, right = 10, top = 8, bottom = 18;
  const X = v => left + (v - xs[0]) / (xs[1] - xs[0] || 1) * (width - left - right);
  const Y = v => height - bottom - (v - ys[0]) / (ys[1] - ys[0] || 1) * (height - top - bottom);
  const line = (x0, y0, x1, y1, style) => `<line x1="${x0}" y1="${y0}" x2="${x1}" y2="${y1}" ${style}/>`;
  const text = (x, y, anchor, words) => `<text x="${x}" y="${y}" text-anchor="${anchor}">${words}</text>`;
  const round = v => Math.abs(v) >= 10 ? Math.round(v) : +v.toPrecision(2);
  const ticks = ys[0] < 0 ? [ys[0], ys[0] / 2, 0] : [ys[0], (ys[0] + ys[1]) / 2, ys[1]];
  let inside = text(left, height - 4, "start", `step ${xs[0]}`) + text(width - right, height - 4, "end", xs[1]);
  const grid = v => line(left, Y(v), width - right, Y(v), 'stroke="#ddd"') + text(left - 4, Y(v) + 4, "end", round(v));
  inside += ticks.map(grid).join("");
  const dotted = 'stroke="#009E73" stroke-width="2" stroke-dasharray="2 4"';
  if (goal !== undefined) inside += line(left, Y(goal), width - right, Y(goal), dotted);
  const dashed = 'class="cursor" stroke="#000" stroke-dasharray="3 3"';
  if (cursor !== undefined) inside += line(X(cursor), top, X(cursor), height - bottom, dashed);
  for (const { x, y, colour, dash } of lines) {
    const points = x.map((v, i) => `${X(v).toFixed(1)},${Y(y[i]).toFixed(1)}`).join(" ");
    const style = `stroke="${colour}" stroke-width="2.2" ${dash ? 'stroke-dasharray="5 4"' : ""}`;
    inside += `<polyline points="${points}" fill="none" ${style}/>`;
  }
  box.innerHTML = `<svg width="${width}" height="${height}" role="img" aria-label="${escaped(label)}">${inside}</svg>`;
  return v => xs[0] + (v - left) / (width - left - right) * (xs[1] - xs[0]); // from pixels back to x
}

// --- bandit: four answers of one token each, a row for each

const ANSWERS = ["A", "B", "C", "D"], TALL = 200, BANDIT_RATE = 4;
const BARS = { ref: "ref", pi: "π", hat: "π̂" }, BOTH = ["off_rl", "fpa"];
const banditRows = () => ANSWERS.map((_, k) => ({ tokens: [k], r: state.right[k] === "1" ? 1 : -1 }));
const stepped = loss => step(loss, [state.pi], [state.ref], banditRows(), state.lam, BANDIT_RATE)[0];
const centred = h => h.map(x => x - mean(h));

function setProbability(name, k, p) { // by the answer's own logit
  const h = [...state[name]], others = h.filter((_, j) => j !== k), top = Math.max(...others);
  const kept = Math.min(0.97, Math.max(0.01, p));
  h[k] = Math.log(kept / (1 - kept)) + top + Math.log(sum(others.map(x => Math.exp(x - top))));
  set({ [name]: centred(h) }, drawBandit);
}
function makeBandit() {
  const bars = Object.entries(BARS).map(([name, word]) => `<div class="bar ${name}">${word}</div>`).join("");
  const weight = loss => `<div class="weight"><i style="background: var(--${loss})"></i><span></span></div>`;
  $("answers").innerHTML = ANSWERS.map((letter, k) => {
    const track = name => `<div class="track ${name}" role="slider" tabindex="0" data-name="${name}" data-k="${k}"
      aria-label="${BARS[name]} of answer ${letter}, percent" aria-valuemin="0" aria-valuemax="100"></div>`;
    const box = `<div class="box">${bars}<svg width="100%" height="${TALL}"></svg>${track("ref")}${track("pi")}</div>`;
    return `<div class="answer">${box}<button data-k="${k}"></button>${BOTH.map(weight).join("")}</div>`;
  }).join("");
  for (const track of document.querySelectorAll(".track")) makeTrack(track, track.dataset.name, +track.dataset.k);
  for (const button of document.querySelectorAll(".answer > button")) button.addEventListener("click", () => {
    const flipped = [...state.right].map((x, k) => k === +button.dataset.k ? 1 - x : x);
    set({ right: flipped.join("") }, drawBandit);
  });
  const one = () => set({ pi: centred(stepped(state.by)) }, drawBandit);
  const train = player($("bandit-play"), "Train", 100, () => { one(); return Math.max(...softmax(state.pi)) < 0.99; });
  $("bandit-step").addEventListener("click", one);
  $("bandit-reset").addEventListener("click", () => {
    train.stop();
    set({ pi: [...LISTS.pi], ref: [...LISTS.ref], right: RIGHT }, drawBandit);
  });
}
function makeTrack(track, name, k) {
  const drag = event => {
    const box = track.getBoundingClientRect();
    setProbability(name, k, (box.bottom - event.clientY) / box.height);
  };
  track.addEventListener("pointerdown", event => {
    track.setPointerCapture(event.pointerId);
    $("answers").classList.remove("untouched");
    drag(event);
  });
  track.addEventListener("pointermove", event => track.hasPointerCapture(event.pointerId) && drag(event));
  track.addEventListener("keydown", event => {
    const by = { ArrowUp: 0.02, ArrowRight: 0.02, ArrowDown: -0.02, ArrowLeft: -0.02, PageUp: 0.1, PageDown: -0.1 }[event.key];
    if (!by) return;
    event.preventDefault();
    setProbability(name, k, softmax(state[name])[k] + by);
  });
}
function arrow(x, from, to, colour) {
  const a = TALL * (1 - from), b = TALL * (1 - to), head = Math.min(5, Math.abs(a - b)) * Math.sign(a - b);
  return `<path class="arrow" d="M${x} ${a}V${b}M${x - 4} ${b + head}L${x} ${b}L${x + 4} ${b + head}" stroke="${colour}"
    stroke-width="2.5" fill="none"/>`;
}
function drawBandit() {
  const h = [state.pi], ref = [state.ref], rows = banditRows();
  const p = { pi: softmax(state.pi), ref: softmax(state.ref), hat: softmax(futureLogits(h, ref, state.lam)[0]) };
  const next = { off_rl: softmax(stepped("off_rl")), fpa: softmax(stepped("fpa")) };
  [...$("answers").children].forEach((answer, k) => {
    for (const name of ["ref", "pi", "hat"]) answer.querySelector(`.bar.${name}`).style.height = `${100 * p[name][k]}%`;
    for (const track of answer.querySelectorAll(".track")) {
      track.style.setProperty("--p", `${100 * p[track.dataset.name][k]}%`);
      track.setAttribute("aria-valuenow", Math.round(100 * p[track.dataset.name][k]));
    }
    const width = answer.querySelector(".box").clientWidth;
    answer.querySelector("svg").innerHTML = BOTH.map((loss, i) =>
      arrow(width * (0.595 + 0.09 * i), p.pi[k], next[loss][k], data.colours[loss])).join("");
    const button = answer.querySelector("button"), right = rows[k].r > 0;
    button.textContent = `${ANSWERS[k]} ${right ? "✓ right" : "✗ wrong"}`;
    button.classList.toggle("right", right);
    answer.querySelectorAll(".weight").forEach((line, i) => {
      const weight = WEIGHTS[BOTH[i]](h, ref, rows[k], state.lam);
      line.children[0].style.width = `${100 * weight}%`;
      line.children[1].textContent = (right ? "+" : "−") + f2(weight);
    });
  });
  choose($("by"), { fpa: "with FPA", off_rl: "with Off-RL" }, state.by, by => set({ by }, drawBandit));
  const good = policy => f2(sum(policy.filter((_, k) => rows[k].r > 0)));
  $("bandit-says").textContent = `Right answers: ${good(p.pi)} of π, ${good(p.hat)} of π̂. ` +
    `After the next step: ${good(next.off_rl)} with Off-RL, ${good(next.fpa)} with FPA.`;
}

// --- two tokens: a shared one, then the right or the wrong one

const twoRows = wrong => [{ tokens: [0, 0], r: 1 }, ...Array(wrong).fill({ tokens: [0, 1], r: -1 })];
const logit = p => Math.log(p / (1 - p));

function simulate(loss, lam, wrong, start, steps) { // [step][shared, right]: probabilities
  const ref = [[logit(SHARED), 0], [logit(start), 0]], rows = twoRows(wrong), path = [];
  for (let h = ref, t = 0; t <= steps; t++, h = step(loss, h, ref, rows, lam, 1)) path.push(h.map(some => softmax(some)[0]));
  return path;
}
const paths = {}; // {setting: what it simulated}
function pathOf(loss) {
  const setting = [loss, loss === "fpa" ? state.lam : 0, state.wrong, state.start];
  return paths[setting] ??= simulate(...setting, STEPS);
}
function makeTwo() {
  $("panels").innerHTML = Object.keys(NAMES).map(loss => `<div class="panel" style="border-color: var(--${loss})"><h3></h3>
    <div class="chips"><div class="chip shared">shared<b></b></div><div class="chip">right<b></b></div>
    <div class="chip">wrong<b></b></div></div><div class="curves"></div><p></p></div>`).join("");
  $("t").max = STEPS;
  const tick = () => { set({ t: Math.min(STEPS, state.t + 2) }, drawTwo); return state.t < STEPS; };
  const play = player($("two-play"), "Play", 40, tick, () => state.t >= STEPS && set({ t: 0 }, drawTwo));
  const guess = key => { set({ guess: key, t: 0 }, drawTwo); play.go(); };
  choose($("guesses"), NAMES, state.guess, guess);
  for (const name of ["t", "wrong", "start"]) slider(name, drawTwo);
}
function drawTwo() {
  const lowest = {}, over = state.t >= STEPS;
  Object.keys(NAMES).forEach((loss, i) => {
    const panel = $("panels").children[i], path = pathOf(loss);
    const shown = path.slice(0, state.t + 1), [shared, right] = shown[shown.length - 1];
    lowest[loss] = Math.min(...path.map(x => x[0]));
    panel.querySelector("h3").textContent = loss === "fpa" ? `FPA, λ = ${state.lam}` : NAMES[loss];
    [shared, right, 1 - right].forEach((p, j) => {
      const chip = panel.querySelectorAll(".chip")[j], tone = ["#56B4E9", "#8fd6bd", "#f0b59a"][j];
      chip.style.background = `linear-gradient(to top, ${tone} ${100 * p}%, #fff ${100 * p}%)`;
      chip.querySelector("b").textContent = f2(p);
    });
    const x = shown.map((_, t) => t), colour = data.colours[loss];
    const lines = [{ x, y: shown.map(v => v[1]), colour, dash: true }, { x, y: shown.map(v => v[0]), colour }];
    const label = `${NAMES[loss]} over steps`;
    chart(panel.querySelector(".curves"), { lines, xs: [0, STEPS], ys: [0, 1], goal: HOLD, height: 130, label });
    const word = lowest[loss] >= HOLD ? "held" : "dragged";
    panel.querySelector("p").textContent = over ? `lowest ${f2(lowest[loss])}: ${word}` : "";
  });
  choose($("guesses"), NAMES, state.guess);
  const worst = Object.keys(lowest).reduce((a, b) => lowest[b] < lowest[a] ? b : a);
  const verdict = state.guess && `You guessed ${NAMES[state.guess]}. It is ${NAMES[worst]}, at ${f2(lowest[worst])}. `;
  const saved = lowest.fpa >= HOLD ? `λ = ${state.lam} saves the shared token. Does a smaller one?`
    : `λ = ${state.lam} does not save the shared token. Slide λ above.`;
  $("two-says").textContent = over ? verdict + saved : "";
  show("t", state.t);
  show("wrong", state.wrong);
  show("start", f2(state.start));
}

// --- real tokens: logs of runs, of the toy and of a published model, one set at a time

const SIDES = ["correct", "incorrect"], ROWS = ["upper", "lower"], LAMS = data.lams; // π̂ is stored at these λ
const EDGES = [-Infinity, -64, -32, -16, -8, -4, -2, -1, 0, 1, 2, Infinity];
const binOf = x => EDGES.findIndex((edge, b) => x < EDGES[b + 1]);
const numbers = text => text.split(",").map(x => x / 1000); // nats; "" is 0
const deep = (x, f) => Array.isArray(x) && typeof x[0] !== "number" ? x.map(some => deep(some, f)) : f(x); // texts, or lists
const nearest = (xs, x) => xs.reduce((best, v, i) => Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best, 0);
const SETS = {};

function prepare(set) { // what is counted once; lists are [pair][method][side][step], and futures have [λ] behind
  const pairs = set.pairs.map(({ ratios, future, ref, ...pair }) =>
    ({ ...pair, ratios: deep(ratios, numbers), future: deep(future, numbers), ref: ref.map(numbers) }));
  for (const { ratios, future, ref } of pairs) future.forEach((sides, m) => sides.forEach((steps, side) =>
    steps.forEach((lams, at) => lams.unshift(ref[side].map((x, t) => Math.min(0, x + ratios[m][side][at][t])))))); // λ = 0: π
  const totals = pairs.map(pair => deep(pair.ratios, sum)), bars = pairs.map(pair => deep(pair.future, xs => Math.exp(mean(xs))));
  const counted = (m, b, at) => totals.filter(of => binOf(of[m][0][at]) === b).length;
  const counts = set.methods.map((_, m) => EDGES.slice(1).map((_, b) => set.steps.map((_, at) => counted(m, b, at))));
  const most = Math.max(1, ...counts.flat().map(some => Math.max(...some.slice(1)))); // at first all are in one bar
  return { ...set, pairs, totals, bars, counts, most, last: set.steps.length - 1 };
}
const real = () => SETS[state.set] ??= prepare(data.sets[state.set]);
const dragOf = (i, m) => real().totals[i][m][0][state.step];

function heat(v) { // red: it lost probability; blue: it gained
  const share = Math.min(1, Math.abs(v) / 4), end = v < 0 ? [178, 24, 43] : [33, 102, 172];
  return [`rgb(${end.map(c => Math.round(247 + (c - 247) * share))})`, share > 0.55 ? "#fff" : "#222"];
}
// the weight of wrong answers over that of right ones, of the means over all pairs
function brake(m, at, l) { return mean(real().bars.map(of => of[m][1][at][l])) / mean(real().bars.map(of => of[m][0][at][l])); }

function chosenToken() {
  const { ratios, tokens } = real().pairs[state.pair], end = ratios[0][state.side][real().last];
  return state.token < 0 ? end.indexOf(Math.min(...end)) : Math.min(state.token, tokens[state.side].length - 1);
}
function makeReal() {
  for (const name of ["step", "pair"]) slider(name, drawReal);
  const tick = () => { set({ step: Math.min(real().last, state.step + 1) }, drawReal); return state.step < real().last; };
  const play = player($("real-play"), "Play", 500, tick, () => state.step >= real().last && set({ step: 0 }, drawReal));
  $("sets").hidden = data.sets.length < 2;
  choose($("sets"), Object.fromEntries(data.sets.map(({ name }, i) => [i, name])), String(state.set), key => {
    play.stop();
    set({ set: +key, step: rangeOf("step", key)[0], pair: rangeOf("pair", key)[0], side: 0, token: -1 }, drawReal);
  });
  SIDES.forEach((name, side) => {
    const here = event => event.target.closest(".cell");
    $(name).addEventListener("pointerover", event => here(event) && drawToken(side, +here(event).dataset.t));
    $(name).addEventListener("pointerleave", () => drawToken());
    $(name).addEventListener("click", event => here(event) && set({ side, token: +here(event).dataset.t }, drawReal));
    $(name).addEventListener("keydown", moveToken);
  });
  const bin = event => event.target.closest(".bin");
  $("histogram").addEventListener("click", event => bin(event) && openBin(bin(event).dataset));
  $("histogram").addEventListener("keydown", event => {
    if (!bin(event) || !["Enter", " "].includes(event.key)) return;
    event.preventDefault();
    const { m, b } = bin(event).dataset;
    openBin({ m, b });
    $("histogram").querySelector(`[data-m="${m}"][data-b="${b}"]`).focus();
  });
}
function moveToken(event) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], side = { ArrowUp: 0, ArrowDown: 1 }[event.key];
  const length = real().pairs[state.pair].tokens[state.side].length;
  if (by) set({ token: (chosenToken() + by + length) % length }, drawReal);
  else if (side !== undefined) set({ side }, drawReal);
  else return;
  event.preventDefault();
  document.querySelector(".cell.chosen").focus();
}
function openBin({ m, b }) { // its next pair
  const inside = real().pairs.map((_, i) => i).filter(i => binOf(dragOf(i, m)) === +b);
  set({ pair: inside.find(i => i > state.pair) ?? inside[0] }, drawReal);
}
function makeTraces(pair) { // blocks of one step of arithmetic each, which wrap on narrow screens
  SIDES.forEach((name, side) => {
    const blocks = [[]];
    pair.tokens[side].forEach((text, t) => {
      blocks[blocks.length - 1].push([text, t]);
      if (/[;,.]/.test(text)) blocks.push([]);
    });
    const cell = m => ([text, t]) => `<span class="cell" role="button" data-t="${t}" data-m="${m}">${escaped(text)}</span>`;
    $(name).innerHTML = blocks.filter(some => some.length).map(some => {
      const rows = real().methods.map((_, m) => some.map(cell(m)).join("")).join("");
      return `<div class="block" style="grid-template-columns: repeat(${some.length}, auto)">${rows}</div>`;
    }).join("");
  });
}
let made; // the pair whose tokens stand there
function drawTraces(pair) {
  if (made !== pair) makeTraces(made = pair);
  SIDES.forEach((name, side) => {
    for (const cell of $(name).querySelectorAll(".cell")) {
      const { t, m } = cell.dataset, chosen = side === state.side && +t === chosenToken();
      [cell.style.backgroundColor, cell.style.color] = heat(pair.ratios[m][side][state.step][t]);
      cell.className = `cell${side === 1 && +t === pair.first ? " wrong" : ""}${chosen ? " chosen" : ""}`;
      cell.tabIndex = chosen && m === "0" ? 0 : -1;
    }
  });
}
function drawToken(side = state.side, t = chosenToken()) {
  const pair = real().pairs[state.pair], l = nearest(LAMS, state.lam);
  const line = (head, text) => `<tr><th>${head}</th>${real().methods.map((_, m) => `<td>${text(m)}</td>`).join("")}</tr>`;
  const names = real().methods.map(({ colour, label }) => `<th style="color: ${colour}"><b>${label}</b></th>`).join("");
  const future = l => m => f3(Math.exp(pair.future[m][side][state.step][l][t]));
  $("token").innerHTML = `<table><tr><th>token ${t + 1}: <b>${escaped(pair.tokens[side][t])}</b></th>${names}</tr>` +
    line("π_ref", () => f3(Math.exp(pair.ref[side][t]))) + line("π", future(0)) + line(`π̂, λ = ${LAMS[l]}`, future(l)) +
    line("log-ratio, nats", m => f2(pair.ratios[m][side][state.step][t])) + "</table>";
}

function drawHistogram() {
  const width = Math.max($("histogram").clientWidth, 100), w = width / (EDGES.length - 1), half = 62, middle = half + 16;
  const text = (x, y, words) => `<text x="${x}" y="${y}" text-anchor="middle">${words}</text>`;
  let inside = EDGES.slice(1, -1).map((edge, b) => text((b + 1) * w, middle + 13, edge)).join("");
  real().counts.forEach((some, m) => some.forEach((counts, b) => {
    const count = counts[state.step], height = Math.max(3, half * Math.min(1, count / real().most));
    const y = m ? middle + 18 : middle - height, here = binOf(dragOf(state.pair, m)) === b;
    const { label, colour } = real().methods[m], all = real().pairs.length;
    const words = escaped(`${label}: ${count} of ${all} answers; opens one`);
    if (count) inside += `<rect class="bin" data-m="${m}" data-b="${b}" role="button" tabindex="0" aria-label="${words}"
      x="${b * w + 1}" y="${y}" width="${w - 2}" height="${height}" fill="${colour}"
      ${here ? 'stroke="#000" stroke-width="2.5"' : ""}/>` +
      text((b + 0.5) * w, m ? y + height + 12 : y - 4, count);
  }));
  const height = middle + 20 + (real().methods.length > 1 ? half + 14 : 0);
  $("histogram").innerHTML = `<svg width="${width}" height="${height}">${inside}</svg>`;
}
function drawCurves(pair) {
  const { steps: x, last, methods, totals, accuracy } = real(), axes = { xs: [0, x[last]], cursor: x[state.step] };
  const line = (y, m, dash) => ({ x, y, colour: methods[m].colour, dash });
  const traces = totals[state.pair].flatMap((sides, m) => sides.map((y, side) => line(y, m, side === 1)));
  const all = traces.flatMap(some => some.y), ys = [Math.min(-1, ...all), Math.max(0.1, ...all)], l = nearest(LAMS, state.lam);
  const brakes = methods.map((_, m) => x.map((_, at) => brake(m, at, methods[m].lam ? l : 0)));
  const toStep = {
    curve: chart($("curve"), { ...axes, ys, lines: traces, label: "the pair's log-ratios over steps" }),
    brake: chart($("brake"), { ...axes, ys: [0, Math.max(1, ...brakes.flat())], lines: brakes.map((y, m) => line(y, m)),
      label: "weight of wrong answers over that of right ones, over steps" }),
    accuracy: chart($("accuracy"), { ...axes, ys: [0, 1], label: "accuracy over steps",
      lines: accuracy[pair.seed].map(([x, y], m) => ({ x, y, colour: methods[m].colour })) }),
  };
  for (const name in toStep) {
    const pick = event => {
      const at = nearest(x, toStep[name](event.clientX - $(name).getBoundingClientRect().left));
      if (at !== state.step) set({ step: at }, drawReal);
    };
    $(name).onpointerdown = pick;
    $(name).onpointermove = event => event.buttons && pick(event);
  }
}
function drawReal() {
  const { steps, last, pairs, methods, about } = real(), pair = pairs[state.pair];
  const swatch = (colour, words) => `<span><span class="swatch" style="background: ${colour}"></span>${words}</span>`;
  $("legend").innerHTML = methods.map(({ colour, label }, m) => swatch(colour, `${ROWS[m]} row: ${label}`)).join("") +
    swatch("#b2182b", "lost probability, by 4 nats or more") + swatch("#2166ac", "gained");
  $("about").textContent = `${about}. π̂ is that of the nearest stored λ: ${LAMS.join(", ")}.`;
  choose($("sets"), {}, String(state.set));
  $("step").max = last;
  $("pair").max = pairs.length - 1;
  drawTraces(pair);
  drawToken();
  drawHistogram();
  drawCurves(pair);
  $("brake-lam").textContent = LAMS[nearest(LAMS, state.lam)];
  show("step", `${steps[state.step]} of ${steps[last]}`);
  show("pair", `${Math.round(100 * state.pair / pairs.length)} % are dragged more; seed ${pair.seed}`);
}

// --- claims

const GOOD = "#00755a", BAD = "#b33a00", OTHER = "#8a5a00";
const TONES = { reproduced: GOOD, supported: GOOD, "not reproduced": BAD, contradicted: BAD, "not run": "#666" };

function interval([low, middle, high], bound, tone) { // a dot and its bar, against the bound
  const ends = [Math.min(low, bound), Math.max(high, bound)], pad = (ends[1] - ends[0]) * 0.12 || 1;
  const X = v => 8 + 264 * (v - ends[0] + pad) / (ends[1] - ends[0] + 2 * pad), at = X(bound);
  const anchor = at > 230 ? "end" : at < 50 ? "start" : "middle", words = [low, middle, high].join(", ");
  return `<svg viewBox="0 0 280 38" width="100%" role="img" aria-label="${words}; bound ${bound}">
    <line x1="${at}" y1="2" x2="${at}" y2="24" stroke="#000" stroke-dasharray="3 2"/>
    <text x="${at}" y="36" text-anchor="${anchor}">bound ${bound}</text>
    <line x1="${X(low)}" y1="13" x2="${X(high)}" y2="13" stroke="${tone}" stroke-width="5" stroke-linecap="round"/>
    <circle cx="${X(middle)}" cy="13" r="6" fill="${tone}"/></svg>`;
}
function makeClaims() {
  $("claims-about").textContent = data.claims.about;
  $("cards").innerHTML = CARDS.map(({ id, sentence, verdict, measured, interval: ends, bound, numbers }) => {
    const tone = TONES[verdict] || OTHER, list = numbers.map(text => `<li>${escaped(text)}</li>`).join("");
    const drawn = ends ? interval(ends, bound, tone) + `<small>${escaped(measured)}</small>` : "";
    return `<div class="card" data-verdict="${escaped(verdict)}" style="--tone: ${tone}"><strong>${escaped(verdict)}</strong>
      <div>${escaped(sentence)}</div>${drawn}
      <details data-id="${escaped(id)}"><summary>${escaped(id)}: the numbers</summary><ul>${list}</ul></details></div>`;
  }).join("");
  for (const details of document.querySelectorAll("#cards details")) details.addEventListener("toggle", () => {
    if (details.open) set({ open: details.dataset.id }, drawClaims);
    else if (state.open === details.dataset.id) set({ open: "" }, drawClaims);
  });
  const counted = { "": `all ${CARDS.length}` };
  for (const { verdict } of CARDS) counted[verdict] = `${verdict} ${CARDS.filter(card => card.verdict === verdict).length}`;
  choose($("verdicts"), counted, state.verdict, verdict => set({ verdict }, drawClaims));
}
function drawClaims() {
  choose($("verdicts"), [], state.verdict);
  for (const card of $("cards").children) card.hidden = state.verdict !== "" && card.dataset.verdict !== state.verdict;
  for (const details of document.querySelectorAll("#cards details")) details.open = details.dataset.id === state.open;
}

// --- start

function drawAll() {
  show("lam", state.lam.toFixed(1));
  choose(document.querySelector("nav"), TITLES, state.at, go);
  [drawBandit, drawTwo, drawReal, drawClaims].forEach(part => part());
}
function go(at) {
  set({ at }, drawAll);
  $(at).scrollIntoView();
}
function restart() {
  state = read();
  drawAll();
}

for (const [loss, colour] of Object.entries(data.colours)) document.documentElement.style.setProperty(`--${loss}`, colour);
state = read();
[makeBandit, makeTwo, makeReal, makeClaims, drawAll].forEach(part => part());
slider("lam", drawAll);
$("reset").addEventListener("click", () => { history.replaceState(null, "", "#"); restart(); scrollTo(0, 0); });
addEventListener("hashchange", restart);
addEventListener("resize", drawAll);
if (state.at !== "bandit") $(state.at).scrollIntoView();
