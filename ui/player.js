// One clock for two to four videos of the same frames. The first pane leads (in a race, the fastest), the others
// follow. The page's value reaches the document only as text and attributes, so nothing in it becomes HTML. The
// template is constant, so Gradio leaves these nodes alone: handlers are added once, and settings survive a new value.

const root = element.querySelector('.player');
const find = (selector) => root.querySelector(selector);
const findAll = (selector) => [...root.querySelectorAll(selector)];
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const text = (node, value) => node.textContent === value || (node.textContent = value);
const flag = (node, name, on) => node.toggleAttribute(`data-${name}`, Boolean(on));

const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
const OVERLAYS = ['wipe', 'flicker', 'difference', 'over'];
const MAX_ZOOM = 16;
const SMALL = 256; // videos that are less wide are shown with visible pixels, others only when they are zoomed
const [stage, canvas, seekBar, curve, keysDialog] = ['.stage', 'canvas', '.seek', '.curve', 'dialog'].map(find);

let value = null;
let panes = []; // {data, figure, view, video, sheet, letter, waiting: time to seek to after the current seek}
const view = { mode: 'side', candidate: 1, alone: null, swapped: false, zoom: 1, x: 0, y: 0 };
const clock = { playing: false, at: 0, onScreen: true, ticking: false, before: 0 };
const race = { time: 0, end: 0 };

const fps = () => value.fps;
const lastFrame = () => Math.max(0, value.frames - 1);
const racing = () => view.mode === 'race';
const raceOver = () => race.time >= race.end;
const finished = (pane) => !racing() || race.time >= pane.data.race.total;
const leader = () => (racing() ? panes.reduce((x, y) => (y.data.race.total < x.data.race.total ? y : x)) : panes[0]);
const candidate = () => panes[view.candidate] || panes[1] || panes[0];
const isOverlay = () => OVERLAYS.includes(view.mode) && panes.length > 1;

// ---- clock: play, pause, seek

function frame() {
  return clock.playing ? clamp(Math.floor(leader().video.currentTime * fps() + 0.01), 0, lastFrame()) : clock.at;
}

function seek(pane, time) {
  if (pane.video.seeking) pane.waiting = time; // a seek during a seek would keep the picture from ever changing
  else pane.video.currentTime = time;
}

function onSeeked(pane) {
  const time = pane.waiting;
  pane.waiting = null;
  if (time !== null) pane.video.currentTime = time;
  draw();
}

function startVideos() {
  const refused = (error) => error.name === 'NotAllowedError' && stop(); // else a pause or a new video came first
  for (const pane of panes.filter(finished)) pane.video.play().catch(refused);
  schedule();
}

function stop() {
  clock.at = frame();
  clock.playing = false;
  panes.forEach((pane) => pane.video.pause());
  render();
}

function play() {
  if (racing() && raceOver()) return restartRace();
  if (clock.at >= lastFrame() && !racing()) seekAll(0);
  clock.playing = true;
  if (clock.onScreen) startVideos();
  render();
}

function pause() {
  stop();
  if (!racing()) goTo(clock.at); // all videos on the middle of the same frame
}

function seekAll(time) {
  panes.forEach((pane) => seek(pane, time));
}

function goTo(index) {
  if (clock.playing) stop();
  clock.at = clamp(index, 0, lastFrame());
  seekAll((clock.at + 0.5) / fps());
  render();
}

function onEnded(pane) {
  if (pane !== leader() || !clock.playing) return;
  if (!racing() && find('[data-do=loop]').getAttribute('aria-pressed') === 'false') return goTo(lastFrame());
  panes.filter(finished).forEach((other) => (other.video.currentTime = 0));
  startVideos();
}

function follow() {
  const lead = leader().video;
  const rate = racing() ? 1 : Number(find('.rate').value);
  for (const { video } of panes.filter(finished)) {
    const lag = video.currentTime - lead.currentTime;
    if (Math.abs(lag) > 1 / fps() && !video.seeking && !lead.seeking) video.currentTime = lead.currentTime;
    video.playbackRate = rate * (1 - clamp(2 * lag, -0.1, 0.1));
    if (video.paused && !lead.paused) video.play().catch(() => {});
  }
}

// ---- race: the panes' recorded previews, each at its recorded time

function restartRace() {
  panes.forEach((pane) => pane.video.pause());
  seekAll(0.5 / fps());
  race.time = 0;
  Object.assign(clock, { playing: true, at: 0 });
  schedule();
  render();
}

function runRace(seconds) {
  const waiting = panes.filter((pane) => !finished(pane));
  race.time = Math.min(race.end, race.time + seconds * Number(find('.pace').value));
  if (waiting.some(finished)) startVideos();
}

function seekRace(time) {
  if (clock.playing) stop();
  race.time = clamp(time, 0, race.end);
  render();
}

function stepRace(direction) {
  const times = panes.flatMap((pane) => pane.data.race.times).sort((x, y) => x - y);
  const next = direction > 0 ? times.find((t) => t > race.time) : times.findLast((t) => t < race.time);
  seekRace(next ?? (direction > 0 ? race.end : 0));
}

function showRace(pane) {
  const { times, steps, total, columns } = pane.data.race;
  const reached = times.findLastIndex((time) => time <= race.time);
  const set = (name, number) => pane.sheet.style.setProperty(name, number);
  flag(pane.figure, 'reached', reached >= 0);
  set('--column', Math.max(0, reached) % columns);
  set('--row', Math.floor(Math.max(0, reached) / columns));
  text(pane.figure.querySelector('.clock'), `${Math.min(race.time, total).toFixed(1)} s`);
  const done = finished(pane) ? steps.at(-1) : (steps[reached] ?? 0);
  text(pane.figure.querySelector('.step'), `step ${done} of ${steps.at(-1)}`);
  text(pane.figure.querySelector('.badge'), `done in ${total.toFixed(1)} s`);
}

// ---- one tick for each painted frame, while something moves

function moves() {
  return clock.onScreen && (clock.playing || (view.mode === 'flicker' && isOverlay() && find('.hertz').value !== '0'));
}

function schedule() {
  if (clock.ticking || !moves()) return;
  clock.ticking = true;
  clock.before = performance.now();
  requestAnimationFrame(tick);
}

function tick() {
  clock.ticking = false;
  if (!root.isConnected || !moves()) return;
  const now = performance.now();
  const seconds = Math.min(0.25, (now - clock.before) / 1000); // a tab in the background gets no ticks
  if (clock.playing && racing() && !raceOver()) runRace(seconds);
  if (clock.playing) follow();
  render();
  draw();
  clock.before = now;
  clock.ticking = true;
  requestAnimationFrame(tick);
}

// ---- what is shown

function onTop() {
  const hertz = Number(find('.hertz').value);
  const odd = view.mode === 'flicker' && hertz && Math.floor((performance.now() / 1000) * hertz) % 2;
  return Boolean(odd) !== view.swapped ? panes[0] : candidate();
}

function isShown(pane) {
  if (isOverlay()) return pane === panes[0] || pane === candidate();
  return view.alone === null || pane === panes[view.alone];
}

function render() {
  if (!panes.length) return;
  const top = onTop();
  root.dataset.mode = view.mode;
  flag(root, 'overlay', isOverlay());
  flag(root, 'swapped', view.swapped);
  flag(root, 'alone', view.alone !== null && view.mode === 'side');
  flag(root, 'playing', clock.playing);
  flag(root, 'over', racing() && raceOver());
  for (const pane of panes) {
    flag(pane.figure, 'shown', isShown(pane));
    flag(pane.figure, 'top', pane === top);
    flag(pane.figure, 'done', racing() && finished(pane));
    if (racing()) showRace(pane);
  }
  renderClock();
}

function renderClock() {
  const now = racing() ? race.time : frame();
  seekBar.max = racing() ? Math.ceil(race.end * 100) : lastFrame();
  seekBar.value = racing() ? Math.round(now * 100) : now;
  const count = racing() ? `${now.toFixed(1)} / ${race.end.toFixed(1)} s` : `${now + 1} / ${value.frames}`;
  seekBar.setAttribute('aria-label', racing() ? 'Second of the race' : 'Frame');
  seekBar.setAttribute('aria-valuetext', count);
  text(find('.count'), count);
  find('.curve .now')?.setAttribute('d', `M${now} 0V1`);
  for (const { pane, name, values } of value.curves || [])
    text(panes[pane].figure.querySelector('.quality'), `${name} ${values[now]?.toFixed(3) ?? ''}`);
  const button = find('[data-do=play]');
  const label = clock.playing ? 'Pause' : 'Play';
  if (button.getAttribute('aria-label') !== label) button.setAttribute('aria-label', label);
}

function renderButtons() {
  const press = (button, on) => button.setAttribute('aria-pressed', on);
  findAll('[data-mode]:is(button)').forEach((button) => press(button, button.dataset.mode === view.mode));
  findAll('[data-zoom]').forEach((button) => press(button, Number(button.dataset.zoom) === view.zoom));
  canvas.setAttribute('aria-label', `Difference of A and ${candidate().letter.toUpperCase()}`);
  panes.forEach((pane, i) => {
    const button = pane.figure.querySelector('.choose');
    const chosen = isOverlay() ? i === 0 || pane === candidate() : view.alone === i;
    button.disabled = racing() || (isOverlay() && (i === 0 || panes.length === 2));
    if (button.disabled) button.removeAttribute('aria-pressed');
    else press(button, chosen);
    button.title = button.disabled ? '' : isOverlay() ? 'Compare this video' : 'This video alone, or all';
  });
}

function draw() {
  const videos = [panes[0], candidate()].map((pane) => pane?.video);
  if (view.mode !== 'difference' || videos.some((video) => !video || video.readyState < 2)) return;
  const [width, height] = [videos[0].videoWidth, videos[0].videoHeight];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const pen = canvas.getContext('2d');
  pen.globalCompositeOperation = 'copy';
  pen.drawImage(videos[0], 0, 0, width, height);
  pen.globalCompositeOperation = 'difference';
  pen.drawImage(videos[1], 0, 0, width, height);
}

function svgPath(className, d) {
  const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  path.setAttribute('class', className);
  path.setAttribute('d', d);
  return path;
}

function drawCurve() {
  const curves = value.curves || [];
  flag(root, 'curves', racing() || curves.length);
  const [paths, width, label] = racing() ? raceLanes() : qualityCurves(curves);
  curve.setAttribute('viewBox', `0 0 ${width || 1} 1`);
  curve.setAttribute('aria-label', label);
  curve.replaceChildren(svgPath('hit', `M0 0H${width}V1H0Z`), ...paths, svgPath('now', 'M0 0V1'));
}

function raceLanes() {
  const lane = (pane, i) => {
    const y = (i + 0.5) / panes.length;
    return svgPath(`lane ${pane.letter}`, `M0 ${y}H${pane.data.race.total}`);
  };
  text(find('.high'), '');
  text(find('.low'), '');
  const totals = panes.map((pane) => `${pane.letter.toUpperCase()} ${pane.data.race.total.toFixed(1)} s`);
  return [panes.map(lane), race.end, `Seconds of denoising: ${totals.join(', ')}`];
}

function qualityCurves(curves) {
  const all = curves.flatMap((one) => one.values);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const y = (v) => (high > low ? 1 - (v - low) / (high - low) : 0);
  const paths = curves.flatMap(({ pane, values }) => {
    const worst = values.indexOf(Math.min(...values));
    const line = values.map((v, i) => `${i ? 'L' : 'M'}${i} ${y(v)}`).join('');
    const { letter } = panes[pane];
    return [svgPath(letter, line), svgPath(`lowest ${letter}`, `M${worst} ${y(values[worst])}h0.001`)];
  });
  text(find('.high'), curves.length ? `${curves[0].name} ${high.toFixed(3)}` : '');
  text(find('.low'), curves.length && low < high ? low.toFixed(3) : '');
  const lowest = curves.map(({ pane, name, values }) => {
    const least = Math.min(...values);
    const where = `in frame ${values.indexOf(least) + 1}`;
    return `${name} of ${panes[pane].letter.toUpperCase()}: lowest ${least.toFixed(3)} ${where}`;
  });
  return [paths, lastFrame(), lowest.join('; ')];
}

// ---- settings

function setMode(mode) {
  const { mode: before } = view;
  if ((mode === 'race' && !canRace()) || (OVERLAYS.includes(mode) && panes.length < 2)) return;
  if (mode === before) return mode === 'race' ? restartRace() : undefined;
  const played = clock.playing;
  view.mode = mode;
  if (mode === 'race') enterRace();
  else if (before === 'race') {
    goTo(0);
    if (played) play();
  }
  afterChange();
}

function enterRace() {
  stop();
  race.time = race.end;
  if (!calm) restartRace();
}

function afterChange() {
  drawCurve();
  renderButtons();
  render();
  draw();
  schedule();
}

function canRace() {
  return panes.length > 0 && panes.every((pane) => pane.data.race);
}

function choose(index) {
  if (!panes[index] || racing()) return;
  if (isOverlay()) view.candidate = index || view.candidate;
  else view.alone = view.alone === index ? null : index;
  afterChange();
}

function setProperty(name, number) {
  root.style.setProperty(name, number);
  render();
}

function setWipe(percent) {
  find('input.wipe').value = percent;
  setProperty('--wipe', `${clamp(percent, 0, 100)}%`);
}

function moveWipe(percent) {
  if (view.mode !== 'wipe') setMode('wipe');
  setWipe(Number(find('input.wipe').value) + percent);
}

function zoomTo(zoom, left = 0.5, top = 0.5) {
  const z = clamp(zoom, 1, MAX_ZOOM);
  moveTo(view.x + left / view.zoom - left / z, view.y + top / view.zoom - top / z, z);
}

function moveTo(x, y, zoom = view.zoom) {
  Object.assign(view, { zoom, x: clamp(x, 0, 1 - 1 / zoom), y: clamp(y, 0, 1 - 1 / zoom) });
  for (const name of ['zoom', 'x', 'y']) root.style.setProperty(`--${name}`, view[name]);
  flag(root, 'zoomed', zoom > 1);
  renderButtons();
}

function worst() {
  const shown = (value.curves || []).filter(({ pane }) => pane !== 0 && isShown(panes[pane]));
  const values = (shown.length ? shown : value.curves || []).map((one) => one.values);
  const least = Math.min(...values.flat());
  const found = values.find((one) => one.includes(least));
  if (found && !racing()) goTo(found.indexOf(least));
}

function toggleLoop() {
  const button = find('[data-do=loop]');
  button.setAttribute('aria-pressed', button.getAttribute('aria-pressed') !== 'true');
}

const ACTIONS = {
  play: () => (clock.playing ? pause() : play()),
  back: () => (racing() ? stepRace(-1) : goTo(frame() - 1)),
  next: () => (racing() ? stepRace(1) : goTo(frame() + 1)),
  restart: () => restartRace(),
  loop: toggleLoop,
  worst,
  keys: () => (keysDialog.open ? keysDialog.close() : keysDialog.showModal()),
  swap: () => ((view.swapped = !view.swapped), afterChange()),
};

// ---- pointer and wheel on the videos

const pointers = new Map();
let grip = null; // {rectangle of the held view, pixels travelled, whether it moves the line of the wipe}

function rectangleAt(target) {
  const hit = !isOverlay() && target.closest?.('.view');
  return (hit || panes[0].view).getBoundingClientRect();
}

function onPointerDown(event) {
  if (event.button || event.target.closest('button, input, select') || !panes.length) return;
  pointers.set(event.pointerId, event);
  const rectangle = rectangleAt(event.target);
  const two = pointers.size > 1;
  grip = { rectangle, travelled: two ? Infinity : 0, wipes: !two && grabsLine(event, rectangle) };
  stage.setPointerCapture(event.pointerId);
  if (grip.wipes) setWipeTo(event);
}

function grabsLine({ clientX }, { left, width }) {
  const line = left + (width * Number(find('input.wipe').value)) / 100;
  return view.mode === 'wipe' && (view.zoom === 1 || Math.abs(clientX - line) < 24);
}

function setWipeTo(event) {
  setWipe((100 * (event.clientX - grip.rectangle.left)) / grip.rectangle.width);
}

function onPointerMove(event) {
  const before = pointers.get(event.pointerId);
  if (!before || !grip) return;
  const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY];
  grip.travelled += Math.abs(dx) + Math.abs(dy);
  if (pointers.size === 2) pinch(event);
  else if (grip.wipes) setWipeTo(event);
  else moveTo(view.x - dx / grip.rectangle.width / view.zoom, view.y - dy / grip.rectangle.height / view.zoom);
  pointers.set(event.pointerId, event);
}

function pinch(event) {
  const other = [...pointers.values()].find((one) => one.pointerId !== event.pointerId);
  const distance = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
  const middle = { clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2 };
  zoomAt(view.zoom * (distance(event) / Math.max(1, distance(pointers.get(event.pointerId)))), middle, grip.rectangle);
}

function zoomAt(zoom, { clientX, clientY }, { left, top, width, height }) {
  zoomTo(zoom, clamp((clientX - left) / width, 0, 1), clamp((clientY - top) / height, 0, 1));
}

function onPointerUp(event) {
  if (!pointers.delete(event.pointerId) || !grip) return;
  const clicked = event.type === 'pointerup' && grip.travelled < 5;
  if (clicked && !grip.wipes) ACTIONS.play();
}

function onWheel(event) {
  const zooms = event.ctrlKey || event.metaKey || document.activeElement === stage; // else the page scrolls
  if (!zooms || !panes.length) return;
  event.preventDefault();
  zoomAt(view.zoom * Math.exp(-clamp(event.deltaY, -100, 100) / 300), event, rectangleAt(event.target));
}

// ---- keys go to the player that has the focus, or was used last

const KEYS = {
  ' ': ACTIONS.play, ',': ACTIONS.back, '.': ACTIONS.next, w: worst, l: toggleLoop, s: ACTIONS.swap, '?': ACTIONS.keys,
  '[': () => moveWipe(-5), ']': () => moveWipe(5), r: () => setMode('race'),
  f: () => setMode(view.mode === 'flicker' ? 'side' : 'flicker'),
  0: () => setMode(view.mode === 'difference' ? 'side' : 'difference'),
  1: () => choose(0), 2: () => choose(1), 3: () => choose(2), 4: () => choose(3),
  '+': () => zoomTo(view.zoom * 2), '=': () => zoomTo(view.zoom * 2), '-': () => zoomTo(view.zoom / 2),
};
const ARROWS = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] };

function isTyping(target) {
  if (target.isContentEditable || target.closest('textarea, select')) return true;
  return target.matches('input') && !(root.contains(target) && target.type === 'range');
}

function onKey(event) {
  if (!root.isConnected) return document.removeEventListener('keydown', onKey);
  const { target, key } = event;
  if (!root.hasAttribute('data-current') || !root.offsetParent || event.defaultPrevented) return;
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(target)) return;
  if (keysDialog.open && key !== '?') return;
  if (key === ' ' && target.closest('button, a, summary, [role=tab]')) return;
  const arrow = target === stage && view.zoom > 1 && ARROWS[key];
  const action = arrow ? () => moveTo(view.x + arrow[0] / view.zoom, view.y + arrow[1] / view.zoom) : KEYS[key];
  if (!action) return;
  event.preventDefault();
  action();
}

function becomeCurrent() {
  document.querySelectorAll('.player[data-current]').forEach((other) => flag(other, 'current', other === root));
  flag(root, 'current', true);
}

// ---- a new value

function addPane() {
  const figure = find('.pane-template').content.cloneNode(true).firstElementChild;
  const index = panes.length;
  const letter = 'abcd'[index];
  const part = (selector) => figure.querySelector(selector);
  const pane = { figure, letter, view: part('.view'), video: part('video'), sheet: part('.sheet'), waiting: null };
  figure.classList.add(letter);
  figure.querySelectorAll('.letter').forEach((node) => text(node, letter.toUpperCase()));
  pane.video.muted = true; // a cloned node does not take it from its attribute
  pane.video.onseeked = () => onSeeked(pane);
  pane.video.onloadeddata = draw;
  pane.video.onended = () => onEnded(pane);
  pane.video.onerror = () => flag(figure, 'missing', pane.video.hasAttribute('src'));
  part('.choose').onclick = () => choose(index);
  stage.insertBefore(figure, canvas);
  panes.push(pane);
}

function fillPane(pane, data) {
  pane.data = data;
  pane.waiting = null;
  flag(pane.figure, 'missing', false);
  if (pane.video.getAttribute('src') !== data.video) pane.video.src = data.video;
  text(pane.figure.querySelector('.label'), data.label);
  text(pane.figure.querySelector('.quality'), '');
  pane.video.setAttribute('aria-label', `${pane.letter.toUpperCase()}: ${data.label}`);
  if (!data.race) return pane.sheet.removeAttribute('src');
  const { sprite, columns, frames } = data.race;
  pane.sheet.style.setProperty('--sheet-columns', columns);
  pane.sheet.style.setProperty('--sheet-rows', Math.ceil(frames / columns));
  if (pane.sheet.getAttribute('src') !== sprite) pane.sheet.src = sprite;
}

function show() {
  value = props.value;
  const data = value?.panes || [];
  root.hidden = !data.length;
  clock.playing = false;
  while (panes.length > data.length) panes.pop().figure.remove();
  while (panes.length < data.length) addPane();
  if (!data.length) return;
  data.forEach((one, i) => fillPane(panes[i], one));
  if (view.candidate >= panes.length) view.candidate = 1;
  view.alone = panes.length > view.alone ? view.alone : null;
  root.dataset.count = panes.length;
  flag(root, 'small', value.width < SMALL);
  root.style.setProperty('--ratio', value.width / value.height);
  race.end = canRace() ? Math.max(...panes.map((pane) => pane.data.race.total)) : 0;
  find('button[data-mode=race]').hidden = !canRace();
  start();
}

function start() {
  const wanted = value.mode || view.mode;
  const possible = wanted === 'race' ? canRace() : panes.length > 1 || !OVERLAYS.includes(wanted);
  view.mode = possible ? wanted : 'side';
  goTo(0);
  if (racing()) enterRace();
  else if (!calm) play();
  afterChange();
}

function watchVisibility(entries) {
  clock.onScreen = entries.at(-1).isIntersecting;
  if (!clock.onScreen) panes.forEach((pane) => pane.video.pause());
  else if (clock.playing) startVideos();
  schedule();
}

function bind() {
  findAll('button[data-do]').forEach((button) => (button.onclick = () => ACTIONS[button.dataset.do]()));
  findAll('button[data-mode]').forEach((button) => (button.onclick = () => setMode(button.dataset.mode)));
  findAll('button[data-zoom]').forEach((button) => (button.onclick = () => zoomTo(Number(button.dataset.zoom))));
  seekBar.oninput = () => (racing() ? seekRace(seekBar.value / 100) : goTo(Number(seekBar.value)));
  curve.onclick = ({ clientX }) => {
    const { left, width } = curve.getBoundingClientRect();
    const share = clamp((clientX - left) / width, 0, 1);
    racing() ? seekRace(share * race.end) : goTo(Math.round(share * lastFrame()));
  };
  find('input.wipe').oninput = ({ target }) => setWipe(Number(target.value));
  find('.opacity').oninput = ({ target }) => setProperty('--opacity', target.value / 100);
  find('.factor').onchange = ({ target }) => setProperty('--factor', target.value);
  find('.hertz').onchange = afterChange;
  stage.onpointerdown = onPointerDown;
  stage.onpointermove = onPointerMove;
  stage.onpointerup = stage.onpointercancel = onPointerUp;
  stage.addEventListener('wheel', onWheel, { passive: false });
  root.addEventListener('pointerdown', becomeCurrent);
  root.addEventListener('focusin', becomeCurrent);
  document.addEventListener('keydown', onKey);
  new IntersectionObserver(watchVisibility).observe(root);
  if (calm) find('.hertz').value = '0';
  setProperty('--opacity', 0.5);
  setProperty('--factor', 4);
  setWipe(50);
}

bind();
show();
watch('value', show);
