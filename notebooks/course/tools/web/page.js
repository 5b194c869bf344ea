// Pictures with controls: all that a control can show stands in the page.
for (const plot of document.querySelectorAll('.plot')) {
  const { controls, pictures, shown, alt } = JSON.parse(plot.querySelector('script').textContent)
  const at = controls.map(control => control.start)
  const image = document.createElement('img'), row = document.createElement('div')
  row.className = 'controls'
  const draw = () => {  // the last control changes fastest
    image.src = pictures[shown[at.reduce((n, i, c) => n * controls[c].labels.length + i, 0)]]
    image.alt = controls.map((c, i) => `${c.name} = ${c.labels[at[i]]}`).join(', ') + '. ' + alt
  }
  controls.forEach(({ name, kind, labels, start }, index) => {
    const label = document.createElement('label'), said = document.createElement('output')
    const input = document.createElement(kind === 'choice' ? 'select' : 'input')
    if (kind === 'choice') labels.forEach(text => input.add(new Option(text)))
    else if (kind === 'box') input.type = 'checkbox'
    else Object.assign(input, { type: 'range', min: 0, max: labels.length - 1 })
    const place = () => kind === 'choice' ? input.selectedIndex
      : kind === 'box' ? labels.indexOf(input.checked ? 'on' : 'off') : Number(input.value)
    if (kind === 'choice') input.selectedIndex = start
    else if (kind === 'box') input.checked = labels[start] === 'on'
    else input.value = start
    input.addEventListener('input', () => {
      at[index] = place()
      say()
      draw()
    })
    const say = () => {
      said.textContent = kind === 'slider' ? labels[at[index]] : ''
      input.setAttribute('aria-valuetext', labels[at[index]])
    }
    label.append(name, input, said)
    row.append(label)
    say()
  })
  plot.append(row, image)
  draw()
}

// Hints, solutions and answers that were opened once keep a mark, also on the next visit.
const folded = [...document.querySelectorAll('main details')]
const key = 'opened ' + location.pathname.split('/').pop()
let opened = []
try { opened = JSON.parse(localStorage.getItem(key)) || [] } catch { /* no storage: no marks */ }
folded.forEach((details, index) => {
  const name = `${index} ${details.querySelector('summary').textContent.trim()}`
  details.classList.toggle('seen', opened.includes(name))
  details.addEventListener('toggle', () => {
    if (!details.open || opened.includes(name)) return
    opened.push(name)
    details.classList.add('seen')
    try { localStorage.setItem(key, JSON.stringify(opened)) } catch { /* as above */ }
  })
})

// The list of contents is a column where there is room for one.
const wide = matchMedia('(min-width: 76rem)'), contents = document.querySelector('.contents')
const unfold = () => { contents.open = wide.matches }
wide.addEventListener('change', unfold)
unfold()
