// Before the first paint: the colours that were chosen, so that nothing flashes. All else is in app.js.
{
  let theme = null;
  try {
    theme = localStorage.getItem("stillhouse.theme");
  } catch {} // storage is forbidden: the system's colours
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
