// Units as tiles: what is clicked goes back to Python.
export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const grid = parentElement.querySelector(".unit-sheet");
  grid.replaceChildren();
  grid.style.setProperty("--tile", data.size + "px");
  const grouped = data.tiles.some((tile) => tile.group);
  grid.classList.toggle("unit-strip", grouped);
  let place = grid;
  let group = "";
  for (const tile of data.tiles) {
    if (grouped && tile.group !== group) {
      group = tile.group;
      const column = document.createElement("section");
      const heading = document.createElement("h4");
      heading.textContent = group;
      place = document.createElement("div");
      place.className = "unit-column";
      column.append(heading, place);
      grid.append(column);
    }
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
    place.append(button);
  }
}
