// Show an answer in `element` with the runs of at least `least` words marked that the text holds too; the
// share of its words in such runs, 0 to 1. The matching is that of Grusky et al. 2018, as in measures.py.
function markCopied(element, answer, text, least = 4) {
  const wordsOf = string => [...string.matchAll(/[\p{L}\p{N}_]+/gu)];
  const held = " " + wordsOf(text.toLowerCase()).map(match => match[0]).join(" ") + " ";
  const words = wordsOf(answer), spellings = words.map(match => match[0].toLowerCase());
  let shown = 0, copied = 0;
  element.replaceChildren();
  for (let start = 0, end; start < words.length; start = Math.max(end, start + 1)) {
    for (end = start; end < words.length && held.includes(` ${spellings.slice(start, end + 1).join(" ")} `);) end++;
    if (end - start < least) continue;
    const from = words[start].index, to = words[end - 1].index + words[end - 1][0].length;
    const mark = document.createElement("mark");
    mark.textContent = answer.slice(from, to);
    element.append(answer.slice(shown, from), mark);
    [shown, copied] = [to, copied + end - start];
  }
  element.append(answer.slice(shown));
  return words.length ? copied / words.length : 0;
}
