// Two pictures, and a line between them that is moved with the mouse, a finger or the arrow keys.
export default function ({ data, parentElement }) {
  const figure = parentElement.querySelector("figure");
  const [second, first] = parentElement.querySelectorAll("img");
  const range = parentElement.querySelector("input");
  const [left, right] = parentElement.querySelectorAll(".name");
  if (!data) return;
  [first.src, second.src] = data.pictures;
  [first.alt, second.alt] = data.names;
  [left.textContent, right.textContent] = data.names;
  range.ariaLabel = `${data.names[0]} left of the line, ${data.names[1]} right of it`;
  second.onload = () => figure.style.setProperty("--aspect", second.naturalWidth / second.naturalHeight);
  range.oninput = () => figure.style.setProperty("--at", `${range.value}%`);
  const button = parentElement.querySelector("button");
  button.onclick = () => (document.fullscreenElement ? document.exitFullscreen() : figure.requestFullscreen());
  figure.onfullscreenchange = () => (button.textContent = document.fullscreenElement ? "Back" : "Large");
}
