// Paints a mask on a picture. Called anew whenever the page is; what was painted stays until another picture comes.
const COLOUR = "#e5343d";
const REMEMBERED = 12; // strokes that can be undone

export default function ({ data, parentElement, setStateValue }) {
  const image = parentElement.querySelector("img");
  const canvas = parentElement.querySelector("canvas");
  const size = parentElement.querySelector("input");
  const buttons = Object.fromEntries([...parentElement.querySelectorAll("button")].map((one) => [one.dataset.do, one]));
  if (!data || canvas.dataset.id === data.id) return;
  canvas.dataset.id = data.id;

  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const before = [];
  let last = null; // where the stroke is
  let aim = null; // where the keyboard's brush is

  image.onload = () => {
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    aim = [canvas.width / 2, canvas.height / 2];
  };
  image.src = data.picture;

  const remember = () => {
    before.push(pen.getImageData(0, 0, canvas.width, canvas.height));
    before.splice(0, before.length - REMEMBERED);
  };
  const width = () => Number(size.value) * Math.max(1, canvas.width / 768);
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
  };
  const paint = (from, to) => {
    pen.globalCompositeOperation = buttons.erase.ariaPressed === "true" ? "destination-out" : "source-over";
    pen.strokeStyle = COLOUR;
    pen.lineWidth = width();
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(to[0] + 0.01, to[1]);
    pen.stroke();
  };
  const tell = () => {
    const painted = pen.getImageData(0, 0, canvas.width, canvas.height).data.some((value, index) => index % 4 === 3 && value);
    if (!painted) return setStateValue("mask", "");
    const mask = document.createElement("canvas");
    mask.width = canvas.width;
    mask.height = canvas.height;
    const ink = mask.getContext("2d");
    ink.drawImage(canvas, 0, 0);
    ink.globalCompositeOperation = "source-in";
    ink.fillStyle = "#fff";
    ink.fillRect(0, 0, mask.width, mask.height);
    ink.globalCompositeOperation = "destination-over";
    ink.fillStyle = "#000";
    ink.fillRect(0, 0, mask.width, mask.height);
    setStateValue("mask", mask.toDataURL("image/png"));
  };

  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    remember();
    last = place(event);
    paint(last, last);
  };
  canvas.onpointermove = (event) => {
    if (!last) return;
    const next = place(event);
    paint(last, next);
    last = next;
  };
  canvas.onpointerup = canvas.onpointercancel = () => {
    if (!last) return;
    last = null;
    tell();
  };
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.onkeydown = (event) => {
    if (!aim || !(event.key in steps || event.key === " ")) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.key === " ") {
      remember();
      paint(aim, aim);
      return tell();
    }
    const pace = width() / 2;
    aim = [
      Math.min(canvas.width, Math.max(0, aim[0] + steps[event.key][0] * pace)),
      Math.min(canvas.height, Math.max(0, aim[1] + steps[event.key][1] * pace)),
    ];
  };
  buttons.erase.onclick = () => {
    buttons.erase.ariaPressed = buttons.erase.ariaPressed === "true" ? "false" : "true";
  };
  buttons.undo.onclick = () => {
    const earlier = before.pop();
    if (!earlier) return;
    pen.putImageData(earlier, 0, 0);
    tell();
  };
  buttons.clear.onclick = () => {
    remember();
    pen.clearRect(0, 0, canvas.width, canvas.height);
    tell();
  };
}
