"use strict";
(function () {
  var folds = document.querySelectorAll("main details");
  function unfold(open) { folds.forEach(function (d) { d.open = open; }); }
  function reveal() {
    var target = /^#[a-z0-9-]+$/.test(location.hash) && document.getElementById(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") { target.open = true; target.scrollIntoView(); }
  }
  var fold = document.getElementById("fold");
  if (folds.length) {
    fold.hidden = false;
    fold.firstElementChild.addEventListener("click", function (event) {
      var open = event.target.getAttribute("aria-pressed") !== "true";
      event.target.setAttribute("aria-pressed", String(open));
      event.target.textContent = open ? "Fold everything" : "Unfold everything";
      unfold(open);
    });
  }
  window.addEventListener("hashchange", reveal);
  window.addEventListener("beforeprint", function () { unfold(true); });
  reveal();
})();
