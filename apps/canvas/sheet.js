// Units as tiles: what is clicked goes back to Python.
export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const grid = parentElement.querySelector(".unit-sheet");
  grid.replaceChildren();
  grid.style.setProperty("--tile", data.size + "px");
  for (const tile of data.tiles) {
    const button = document.createElement("button");
    button.className = "unit-tile";
    button.title = tile.title; // as text: nothing of it becomes markup
    if (tile.picture) {
      const image = document.createElement("img");
      image.src = tile.picture;
      image.alt = tile.title;
      image.loading = "lazy";
      button.append(image);
    }
    if (!tile.picture && tile.text) {
      const word = document.createElement("span");
      word.className = "word";
      word.textContent = tile.text.replaceAll("\n", "↵");
      button.append(word);
    }
    const label = document.createElement("span");
    label.textContent = tile.label;
    button.append(label);
    button.onclick = () => setTriggerValue("picked", tile.id);
    grid.append(button);
  }
}
