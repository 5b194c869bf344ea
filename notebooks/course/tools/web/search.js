// Sections in which all words of the question occur, those with a word in the heading first.
const sections = JSON.parse(document.getElementById('sections').textContent)
const asked = (new URLSearchParams(location.search).get('q') || '').trim()
const words = asked.toLowerCase().split(/\s+/).filter(Boolean)
const box = document.querySelector('main input'), list = document.querySelector('main ol')
box.value = asked
const count = (text, word) => text.toLowerCase().split(word).length - 1
const found = !words.length ? [] : sections.map(section => {
  const [, , title, heading, text] = section
  const counts = words.map(w => 10 * count(heading, w) + 3 * count(title, w) + count(text, w))
  return { section, score: counts.includes(0) ? 0 : counts.reduce((a, b) => a + b) }
}).filter(hit => hit.score).sort((a, b) => b.score - a.score)

const marked = (parent, text) => {  // as text, never as HTML: the question is the reader's
  for (let rest = text; rest;) {
    const places = words.map(w => [rest.toLowerCase().indexOf(w), w.length]).filter(([i]) => i >= 0)
    const [at, size] = places.sort((a, b) => a[0] - b[0])[0] || [rest.length, 0]
    parent.append(rest.slice(0, at))
    if (size) parent.append(Object.assign(document.createElement('mark'),
                                          { textContent: rest.slice(at, at + size) }))
    rest = rest.slice(at + size)
  }
}
for (const { section: [page, anchor, title, heading, text] } of found.slice(0, 40)) {
  const item = document.createElement('li'), link = document.createElement('a')
  const line = document.createElement('p')
  link.href = page + '.html' + (anchor && '#' + encodeURIComponent(anchor))
  marked(link, heading === title ? title : `${title}: ${heading}`)
  const first = Math.max(0, Math.min(...words.map(w => text.toLowerCase().indexOf(w))
    .filter(i => i >= 0), text.length) - 80)
  marked(line, (first ? '… ' : '') + text.slice(first, first + 240) + ' …')
  item.append(link, line)
  list.append(item)
}
document.getElementById('count').textContent = !words.length ? ''
  : `${found.length} section${found.length === 1 ? '' : 's'} with ${words.join(' and ')}`
