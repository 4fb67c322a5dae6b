// Keys that bring the cursor into a field: { key: the field's key in Python }.
let press = null;

export default function ({ data }) {
  document.removeEventListener("keydown", press);
  press = (event) => {
    const typed = event.target.closest?.("input, textarea, [contenteditable=true]");
    if (typed || event.ctrlKey || event.metaKey || event.altKey || !(event.key in data.fields)) return;
    const field = document.querySelector(`.st-key-${data.fields[event.key]} input`);
    if (!field) return;
    event.preventDefault(); // the key itself is not typed
    field.focus();
    field.select();
  };
  document.addEventListener("keydown", press);
  return () => document.removeEventListener("keydown", press);
}
