// Cuts a long text into parts that are spoken one after the other, and guesses how long speech takes.

export const ONE_REQUEST = 600; // characters that are spoken by a single request
const PART = 400;
const LETTERS_PER_SECOND = 14; // before anything has been heard
const HAN_PER_SECOND = 4.5;

/** Parts of at most about 400 characters that end where sentences do, else at a comma or a blank. */
export function parts(text) {
  const whole = text.trim();
  if (whole.length <= ONE_REQUEST) return whole ? [whole] : [];
  const found = [];
  let part = "";
  for (const sentence of sentences(whole)) {
    if (part && part.length + sentence.length > PART) {
      found.push(part);
      part = "";
    }
    part += sentence;
  }
  found.push(part);
  return found.map((one) => one.trim()).filter((one) => /[\p{L}\p{N}]/u.test(one));
}

function* sentences(text) {
  for (const sentence of text.match(/[^.!?。！？\n]*[.!?。！？\n]+["'”’）)\]]*\s*|[^.!?。！？\n]+$/gu) ?? []) {
    let rest = sentence;
    while (rest.length > PART) {
      const head = rest.slice(0, PART);
      const at = Math.max(head.lastIndexOf(", "), head.lastIndexOf("，"), head.lastIndexOf("；"));
      const cut = at > PART / 2 ? at + 1 : head.lastIndexOf(" ") > 0 ? head.lastIndexOf(" ") + 1 : PART;
      yield rest.slice(0, cut);
      rest = rest.slice(cut);
    }
    yield rest;
  }
}

/** Seconds that the text may take to say. */
export function guessSeconds(text) {
  const han = text.match(/\p{Script=Han}/gu)?.length ?? 0;
  return han / HAN_PER_SECOND + (text.length - han) / LETTERS_PER_SECOND;
}
