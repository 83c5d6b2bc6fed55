// Runs once, when the page has been built: what gradio's own controls cannot do.
() => {
  // A theme that was chosen here before; else gradio follows the system, or ?__theme=.
  const saved = localStorage.getItem("visipruner-theme");
  if (saved && !new URLSearchParams(location.search).has("__theme"))
    document.body.classList.toggle("dark", saved === "dark");

  // The conversation follows its end, unless somebody has scrolled up to read; on a narrow page the window follows a
  // new question.
  const talk = document.querySelector("#talk");
  let follows = true;
  let questions = 0;
  talk.addEventListener("scroll", () => {
    follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
  });
  new MutationObserver(() => {
    const asked = talk.querySelectorAll("article");
    if (follows) talk.scrollTop = talk.scrollHeight;
    if (asked.length > questions && innerWidth <= 720) asked[asked.length - 1].scrollIntoView({ block: "nearest" });
    questions = asked.length;
  }).observe(talk, { childList: true, subtree: true, characterData: true });
}
