// A list of the versions, and a banner on all but the newest release.
document.addEventListener("DOMContentLoaded", async () => {
  const base = document.documentElement.dataset.content_root;
  const answer = await fetch(`${base}versions.json`).catch(() => null);
  if (!answer?.ok) return;
  const { here, root, names } = await answer.json();
  if (names.length < 2) return;
  const address = name => `${base}${root}${name}/index.html`;
  const options = names.map(name =>
    `<option value="${address(name)}" ${name === here ? "selected" : ""}>${name}</option>`);
  document.querySelector(".sidebar-brand").insertAdjacentHTML("afterend",
    `<label class="versions">version <select>${options.join("")}</select></label>`);
  document.querySelector(".versions select").addEventListener("change", event => {
    location.href = event.target.value;
  });
  if (here === names[0]) return;
  const which = /^\d/.test(here) ? `version ${here}` : "the development version";
  document.querySelector("article").insertAdjacentHTML("afterbegin",
    `<p class="version-banner">This is ${which}. The newest release is
     <a href="${base}${root}index.html">${names[0]}</a>.</p>`);
});
