const form = document.querySelector("#login");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const error = form.querySelector(".error");
  error.textContent = "";
  try {
    const response = await fetch("/login", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ token: form.elements.token.value.trim() }),
    });
    if (response.ok) location.reload();
    else error.textContent = (await response.json()).error;
  } catch {
    error.textContent = "no connection to the run";
  }
});
