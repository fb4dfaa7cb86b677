// Requests to the run. Errors carry what the server says of them.

export async function ask(path, method = "GET", body = undefined) {
  const response = await fetch(path, {
    method,
    headers: body === undefined ? {} : { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
    signal: AbortSignal.timeout(8000),
  });
  if (response.status === 401) location.reload(); // the token has changed
  const text = await response.text();
  let answer = null;
  try {
    answer = text ? JSON.parse(text) : null;
  } catch {
    // not from us, but from something between
  }
  if (!response.ok) throw new Error(answer?.error ?? `the server answers ${response.status}`);
  return answer;
}

export const pathOf = (stream, ...rest) => ["/streams", ...[stream, ...rest].map(encodeURIComponent)].join("/");
