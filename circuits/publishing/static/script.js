// Plain script, no modules and no requests, so that pages work from a disk. What it adds can be done without it.
(function () {
  "use strict";
  var filter = document.getElementById("filter");
  if (filter) {
    filter.hidden = false;
    var all = Array.prototype.slice.call(document.querySelectorAll("[data-words]"));
    var told = document.getElementById("told");
    filter.addEventListener("input", function () {
      var words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      var n = 0;
      all.forEach(function (item) {
        var own = item.getAttribute("data-words");
        item.hidden = !words.every(function (word) { return own.indexOf(word) >= 0; });
        n += item.hidden ? 0 : 1;
      });
      told.textContent = n + " of " + all.length + " units";
    });
  }
  var search = document.getElementById("search");
  var units = window.CIRCUITS_UNITS || [];
  if (search) {
    search.hidden = false;
    var list = document.getElementById("found");
    search.addEventListener("input", function () {
      var words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      list.replaceChildren();
      if (!words.length) return;
      var found = units.filter(function (unit) {
        return words.every(function (word) { return unit[0].toLowerCase().indexOf(word) >= 0; });
      });
      found.slice(0, 40).forEach(function (unit) {
        var item = document.createElement("li");
        var link = document.createElement("a");
        link.href = unit[1];
        link.textContent = unit[0]; // as text: nothing of it becomes markup
        item.append(link);
        list.append(item);
      });
      document.getElementById("told").textContent = found.length + " units";
    });
  }
  document.addEventListener("keydown", function (event) {
    if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
    var name = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    var link = name && document.querySelector("a[rel=" + name + "]");
    if (link) location.href = link.href;
  });
})();
