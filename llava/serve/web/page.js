// Runs once, when the page has been built: what gradio's own controls cannot do.
() => {
  // Until everything has its place the page is not shown (`UNTIL_BUILT` in page.py), so that nothing jumps.
  let height = 0;
  let steady = 0;
  const watch = setInterval(() => {
    const now = document.querySelector("#settings")?.getBoundingClientRect().top ?? 0;
    steady = now && now === height ? steady + 1 : 0;
    height = now;
    if (steady < 3) return;
    clearInterval(watch);
    document.documentElement.classList.add("is-built");
  }, 50);

  // A theme that was chosen here before; else gradio follows the system, or ?__theme=.
  const saved = localStorage.getItem("visipruner-theme");
  if (saved && !new URLSearchParams(location.search).has("__theme"))
    document.body.classList.toggle("dark", saved === "dark");

  // The conversation follows its end until somebody scrolls up to read; on a narrow page the window does, from one
  // question to the next.
  const talk = document.querySelector("#talk");
  let follows = true;
  let questions = 0;
  talk.addEventListener("scroll", () => {
    follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
  });
  for (const kind of ["wheel", "touchmove"]) addEventListener(kind, () => { if (innerWidth <= 720) follows = false; });
  new MutationObserver(() => {
    const asked = talk.querySelectorAll("article");
    if (asked.length > questions) follows = true;
    questions = asked.length;
    if (!follows || !questions) return;
    talk.scrollTop = talk.scrollHeight;
    if (innerWidth <= 720) asked[questions - 1].scrollIntoView({ block: "nearest" });
  }).observe(talk, { childList: true, subtree: true, characterData: true });
}
