// Runs once, when the page has been built: what gradio's own controls cannot do.
() => {
  // A theme that was chosen here before; else gradio follows the system, or ?__theme=.
  const saved = localStorage.getItem("visipruner-theme");
  if (saved && !new URLSearchParams(location.search).has("__theme"))
    document.body.classList.toggle("dark", saved === "dark");

  // The conversation follows its end, unless somebody has scrolled up to read.
  const talk = document.querySelector("#talk");
  let follows = true;
  talk.addEventListener("scroll", () => {
    follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
  });
  new MutationObserver(() => {
    if (follows) talk.scrollTop = talk.scrollHeight;
  }).observe(talk, { childList: true, subtree: true, characterData: true });
}
