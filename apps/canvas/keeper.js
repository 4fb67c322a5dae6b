// Keeps texts in the browser's tab, and gives Python what the tab's last session has left there.
const SESSION = "circuits session", KEPT = "circuits kept ";
let told = false; // that the tab cannot keep things: once

function opened() {
  try {
    return window.sessionStorage;
  } catch { // a browser that lets no page keep anything
    return null;
  }
}

export default function ({ data, setTriggerValue }) {
  const tab = opened();
  if (tab === null) {
    if (!told) setTriggerValue("full", true);
    told = true;
    return;
  }
  if (tab.getItem(SESSION) !== data.session) {
    if (!data.recalls) return;
    tab.setItem(SESSION, data.session);
    const names = Object.keys(tab).filter((name) => name.startsWith(KEPT));
    if (names.length)
      setTriggerValue("recalled", Object.fromEntries(names.map((name) => [name.slice(KEPT.length), tab.getItem(name)])));
    return;
  }
  for (const [slot, text] of Object.entries(data.slots)) {
    tab.removeItem(KEPT + slot);
    try {
      if (text) tab.setItem(KEPT + slot, text);
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
      if (!told) setTriggerValue("full", true);
      told = true;
    }
  }
}
