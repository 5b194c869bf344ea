// A Llama in plain JavaScript: packed 4-bit weights, an adapter beside them, greedy decoding.
const model = JSON.parse(document.getElementById('model').textContent)
const { sizes, ids } = model

const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0))
const halves = text => {  // fp16 -> numbers
  const raw = new Uint16Array(bytes(text).buffer), out = new Float32Array(raw.length)
  raw.forEach((h, i) => {
    const exponent = h >> 10 & 31, fraction = h & 1023
    const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24
    out[i] = h >> 15 ? -size : size
  })
  return out
}
const even = x => {  // the nearest integer, ties to even, as torch.round
  const down = Math.floor(x), rest = x - down
  return rest < 0.5 ? down : rest > 0.5 ? down + 1 : down + down % 2 * Math.sign(down % 2)
}
const half = x => {  // the nearest fp16 to a positive number
  if (!x) return 0
  const unit = 2 ** (Math.max(Math.floor(Math.log2(x)), -14) - 10)
  return even(x / unit) * unit
}

const dense = Object.fromEntries(Object.entries(model.dense).map(([n, t]) => [n, halves(t)]))
const packed = Object.fromEntries(Object.entries(model.packed).map(([name, layer]) => {
  const [out, inputs] = layer.shape, codes = bytes(layer.codes), zero = bytes(layer.zero)
  const scale = halves(layer.scale), weight = new Float32Array(out * inputs)
  for (let i = 0; i < weight.length; i++) {  // two codes a byte, the first in the low half
    const q = i % 2 ? codes[i >> 1] >> 4 : codes[i >> 1] & 15
    const g = Math.floor(i / inputs) * (inputs / sizes.group) + Math.floor(i % inputs / sizes.group)
    weight[i] = (q - zero[g]) * scale[g]
  }
  return [name, { out, inputs, weight, used: weight, a: halves(layer.a), b: halves(layer.b) }]
}))

// Round to nearest on grids of min to max, each operation in fp32 as in quantize_rtn.
function rounded(weight, bits, size) {
  const most = 2 ** bits - 1, out = new Float32Array(weight.length), f = Math.fround
  for (let from = 0; from < weight.length; from += size) {
    let low = 0, high = 0
    for (let i = from; i < from + size; i++) {
      low = Math.min(low, weight[i])
      high = Math.max(high, weight[i])
    }
    const scale = half(f(f(high - low) / most)) || 1
    const zero = Math.min(Math.max(even(f(-low / scale)), 0), most)
    for (let i = from; i < from + size; i++) {
      const q = Math.min(Math.max(even(f(f(weight[i] / scale) + zero)), 0), most)
      out[i] = (q - zero) * scale
    }
  }
  return out
}

function quantize(bits, group) {
  for (const layer of Object.values(packed))
    layer.used = bits === 4 ? layer.weight : rounded(layer.weight, bits, group)
}

function times(matrix, rows, columns, x) {
  const y = new Float32Array(rows)
  for (let r = 0, i = 0; r < rows; r++) {
    let sum = 0
    for (let c = 0; c < columns; c++) sum += matrix[i++] * x[c]
    y[r] = sum
  }
  return y
}

function linear(name, x, rank) {  // W x + B (A x), with the first `rank` rows of A
  const { out, inputs, used, a, b } = packed[name]
  const y = times(used, out, inputs, x), thin = times(a, rank, inputs, x)
  for (let r = 0; r < out; r++)
    for (let k = 0; k < rank; k++) y[r] += b[r * sizes.rank + k] * thin[k]
  return y
}

function norm(name, x) {
  const square = x.reduce((sum, v) => sum + v * v, 0) / x.length
  const scale = 1 / Math.sqrt(square + sizes.eps)
  return x.map((v, i) => v * scale * dense[name][i])
}

function turned(x, place) {  // rope: features i and i + head / 2 are a pair
  const y = new Float32Array(x.length), n = sizes.head / 2
  for (let h = 0; h < x.length; h += sizes.head)
    for (let i = 0; i < n; i++) {
      const angle = place * sizes.theta ** (-i / n), c = Math.cos(angle), s = Math.sin(angle)
      y[h + i] = x[h + i] * c - x[h + i + n] * s
      y[h + i + n] = x[h + i + n] * c + x[h + i] * s
    }
  return y
}

// Logits after one more token; `past` holds the keys and values of those before, by layer.
function next(token, past, rank) {
  const embedding = dense['model.embed_tokens.weight'], place = past[0].keys.length
  let x = embedding.slice(token * sizes.width, (token + 1) * sizes.width)
  past.forEach(({ keys, values }, l) => {
    const at = `model.layers.${l}.`, h = norm(at + 'input_layernorm.weight', x)
    const [q, k, v] = 'qkv'.split('').map(p => linear(`${at}self_attn.${p}_proj`, h, rank))
    const query = turned(q, place), mixed = new Float32Array(sizes.width)
    keys.push(turned(k, place))
    values.push(v)
    for (let from = 0; from < sizes.width; from += sizes.head) {
      const scores = keys.map(key => {
        let sum = 0
        for (let i = from; i < from + sizes.head; i++) sum += query[i] * key[i]
        return sum / Math.sqrt(sizes.head)
      })
      softmax(scores).forEach((p, t) => {
        for (let i = from; i < from + sizes.head; i++) mixed[i] += p * values[t][i]
      })
    }
    const o = linear(at + 'self_attn.o_proj', mixed, rank)
    x = x.map((v, i) => v + o[i])
    const m = norm(at + 'post_attention_layernorm.weight', x)
    const gate = linear(at + 'mlp.gate_proj', m, rank), up = linear(at + 'mlp.up_proj', m, rank)
    const d = linear(at + 'mlp.down_proj', gate.map((g, i) => g / (1 + Math.exp(-g)) * up[i]), rank)
    x = x.map((v, i) => v + d[i])
  })
  return times(embedding, model.vocabulary.length, sizes.width, norm('model.norm.weight', x))
}

function softmax(scores) {
  const top = Math.max(...scores), e = scores.map(s => Math.exp(s - top))
  const sum = e.reduce((a, b) => a + b)
  return e.map(v => v / sum)
}

const empty = () => Array.from({ length: sizes.layers }, () => ({ keys: [], values: [] }))

// The tokenizer: bytes as letters, digits one by one, then merges by rank.
const letters = (() => {
  const plain = [...Array(256).keys()].filter(b => b > 32 && b < 127 || b > 160 && b !== 173)
  let extra = 256
  return [...Array(256).keys()].map(b => String.fromCharCode(plain.includes(b) ? b : extra++))
})()
const byteOf = Object.fromEntries(letters.map((c, b) => [c, b]))
const rankOf = new Map(model.merges.map((pair, i) => [pair.join(' '), i]))
const idOf = new Map(model.vocabulary.map((text, i) => [text, i]))
const WORDS = /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu

function encode(text) {
  const found = []
  for (const piece of text.split(/(\p{N})/u).filter(Boolean))
    for (const word of piece.match(WORDS)) {
      let parts = [...new TextEncoder().encode(word)].map(b => letters[b])
      while (parts.length > 1) {
        const ranks = parts.slice(1).map((p, i) => rankOf.get(`${parts[i]} ${p}`) ?? Infinity)
        const best = Math.min(...ranks), i = ranks.indexOf(best)
        if (best === Infinity) break
        parts.splice(i, 2, parts[i] + parts[i + 1])
      }
      found.push(...parts.map(p => idOf.get(p)))
    }
  return found
}
const decode = tokens => new TextDecoder().decode(Uint8Array.from(
  tokens.flatMap(t => [...model.vocabulary[t]].map(c => byteOf[c]))))

// For who wants to compare: the logits after each token of a prompt, by settings.
window.logits = (text, bits = 4, group = 64, rank = sizes.rank) => {
  quantize(bits, group)
  const past = empty()
  return [ids.bos, ...encode(text)].map(token => Array.from(next(token, past, rank)))
}
window.encode = encode

// The page. What is asked while an answer is being made takes its place.
const $ = id => document.getElementById(id)
const BITS = [2, 3, 4], GROUPS = [32, 64, 128, 256], LIMIT = 160, CONTEXT = 1024
let asked = 0

function settings() {
  const bits = BITS[$('bits').value], group = GROUPS[$('group').value], rank = +$('rank').value
  for (const [id, said] of [['bits', bits], ['group', bits === 4 ? sizes.group : group],
                            ['rank', rank]]) {
    $(id).nextElementSibling.textContent = said
    $(id).setAttribute('aria-valuetext', said)
  }
  $('group').disabled = bits === 4
  const stored = bits + 24 / (bits === 4 ? sizes.group : group)  // scale and zero-point
  $('setting').textContent = (bits === 4 ? 'GPTQ, as packed' : 'rounded to nearest')
    + `: ${stored.toFixed(2)} bits a weight with scale and zero-point`
  return { bits, group, rank }
}

function likely(logits) {
  const p = softmax(Array.from(logits))
  return [...p.keys()].sort((a, b) => p[b] - p[a]).slice(0, 5).map(t => [t, p[t]])
}

function show(tokens) {
  $('likely').tBodies[0].replaceChildren(...tokens.map(([token, p]) => {
    const row = document.createElement('tr'), bar = document.createElement('td')
    const text = token === ids.eos ? 'the end' : JSON.stringify(decode([token])).slice(1, -1)
    row.append(...[text, (100 * p).toFixed(1) + '%'].map(said =>
      Object.assign(document.createElement('td'), { textContent: said })), bar)
    bar.innerHTML = `<div class="bar" style="width: ${Math.round(200 * p)}px"></div>`
    return row
  }))
}

async function ask() {
  const mine = ++asked, { bits, group, rank } = settings(), past = empty(), said = []
  const breathe = () => new Promise(done => setTimeout(done))
  $('answer').replaceChildren()
  $('verdict').textContent = '...'
  await breathe()
  quantize(bits, group)
  const prompt = [ids.bos, ...encode(model.prompt.replace('{question}', $('question').value.trim()))]
  if (prompt.length + LIMIT > CONTEXT) return $('verdict').textContent = 'That is too long a question.'
  let logits
  for (const token of prompt) {
    if (mine !== asked) return
    logits = next(token, past, rank)
    if (past[0].keys.length % 8 === 0) await breathe()
  }
  while (said.length < LIMIT) {
    const best = likely(logits), token = best[0][0]
    if (said.length === 0) show(best)
    if (token === ids.eos) break
    said.push(token)
    const piece = Object.assign(document.createElement('span'),
                                { textContent: decode([token]), tabIndex: 0 })
    for (const event of ['pointerenter', 'focus']) piece.addEventListener(event, () => show(best))
    $('answer').append(piece)
    await breathe()
    if (mine !== asked) return
    logits = next(token, past, rank)
  }
  const gold = model.problems.find(p => p.question === $('question').value.trim())?.gold
  const found = decode(said).match(/####\s*(-?[\d,.]*\d)/)?.[1]
  $('verdict').textContent = gold === undefined ? '' : found === gold
    ? `\u2713 ${gold} is right` : `\u2717 the answer is ${gold}`
}

model.problems.forEach((p, i) => $('problem').add(new Option(`${i + 1}: ${p.question.slice(0, 60)}\u2026`)))
const choose = () => {
  $('question').value = model.problems[$('problem').selectedIndex].question
  ask()
}
$('problem').addEventListener('input', choose)
$('question').addEventListener('change', ask)
for (const id of ['bits', 'group', 'rank']) {
  $(id).addEventListener('input', settings)
  $(id).addEventListener('change', ask)
}
$('ask').addEventListener('submit', event => event.preventDefault())
choose()
