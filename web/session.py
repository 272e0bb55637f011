"""The key by which a browser finds its own jobs again, after a reload and after a connection that dropped."""

from __future__ import annotations

import uuid

# Only this browser knows its key. The nulls stand for what the server holds itself: the session and what was seen.
KEY_JS = """() => {
  try {
    const name = "concept-ablation-session";
    let key = localStorage.getItem(name) || "";
    if (!/^[0-9a-f]{32}$/.test(key)) {
      key = Array.from(crypto.getRandomValues(new Uint8Array(16)), b => b.toString(16).padStart(2, "0")).join("");
      localStorage.setItem(name, key);
    }
    return [key, null, null];
  } catch (error) { return ["", null, null]; }
}"""


def session_of(key: str | None, session: str) -> str:
    """The browser's own key, or a new one if it has none; the session stays if a job was started in it already."""
    if session:
        return session
    return key if key and len(key) == 32 and key.isalnum() else uuid.uuid4().hex
