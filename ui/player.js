// Two videos, one clock: b follows a. Gradio patches a new value into the same nodes, so handlers are assigned, not
// added, and the loop of an older value ends once its token has been replaced.
function bind() {
  const root = element.querySelector('.ab');
  if (!root) return;
  const [a, b] = root.querySelectorAll('video');
  const token = (element.abToken = {});
  const find = (s) => root.querySelector(s);
  const fps = +root.dataset.fps, frames = +root.dataset.frames;
  const seek = find('.seek'), count = find('.count'), play = find('[data-do=play]'), canvas = find('canvas');
  const frame = () => Math.min(frames - 1, Math.floor(a.currentTime * fps + 0.01));
  const show = () => { seek.value = frame(); count.textContent = `${frame() + 1} / ${frames}`; };
  const goto = (f) => { a.currentTime = b.currentTime = (Math.max(0, Math.min(frames - 1, f)) + 0.5) / fps; };
  const mode = (m) => {
    root.dataset.mode = window.abMode = m;
    root.querySelectorAll('.modes button').forEach((x) => x.setAttribute('aria-pressed', x.dataset.mode === m));
    draw();
  };
  const draw = () => {
    if (root.dataset.mode !== 'difference' || a.readyState < 2 || b.readyState < 2) return;
    const w = (canvas.width = a.videoWidth), h = (canvas.height = a.videoHeight);
    const pen = canvas.getContext('2d', { willReadFrequently: true });
    pen.drawImage(a, 0, 0, w, h);
    const one = pen.getImageData(0, 0, w, h);
    pen.drawImage(b, 0, 0, w, h);
    const two = pen.getImageData(0, 0, w, h);
    for (let i = 0; i < one.data.length; i += 4)
      for (let c = 0; c < 3; c++) one.data[i + c] = Math.min(255, 4 * Math.abs(one.data[i + c] - two.data[i + c]));
    pen.putImageData(one, 0, 0);
  };
  const follow = () => {
    if (element.abToken !== token) return;
    const lag = b.currentTime - a.currentTime;
    if (Math.abs(lag) > 1.5 / fps) b.currentTime = a.currentTime;
    else b.playbackRate = a.playbackRate * (1 - Math.max(-0.1, Math.min(0.1, lag)));
    show();
    draw();
    if (a.isConnected) a.requestVideoFrameCallback(follow);
  };
  const start = () => { a.play().catch(() => (play.textContent = '▶')); b.play().catch(() => {}); };
  const pause = () => { a.pause(); b.pause(); b.currentTime = a.currentTime; };
  a.onplay = () => (play.textContent = '❚❚');
  a.onpause = () => (play.textContent = '▶');
  a.onended = () => { a.currentTime = b.currentTime = 0; start(); };
  a.onseeked = () => { show(); draw(); };
  b.onseeked = draw;
  play.onclick = () => (a.paused ? start() : pause());
  find('[data-do=back]').onclick = () => { pause(); goto(frame() - 1); };
  find('[data-do=next]').onclick = () => { pause(); goto(frame() + 1); };
  seek.oninput = () => { pause(); goto(+seek.value); };
  const rate = () => [a, b].forEach((v) => (v.defaultPlaybackRate = v.playbackRate = +find('.rate').value));
  const wipe = () => root.style.setProperty('--wipe', `${find('.wipe').value}%`);
  find('.rate').onchange = rate;
  find('.wipe').oninput = wipe;
  root.querySelectorAll('.modes button').forEach((x) => (x.onclick = () => mode(x.dataset.mode)));
  mode(window.abMode || 'side');
  rate();  // the controls survive a new value, but what they had set on the videos does not
  wipe();
  play.textContent = a.paused ? '▶' : '❚❚';
  if (a.requestVideoFrameCallback) a.requestVideoFrameCallback(follow);
  if (a.getAttribute('src') && !matchMedia('(prefers-reduced-motion: reduce)').matches) start();
  show();
}
bind();
watch('value', bind);
