"""The page that `python sample.py --html=routing.html` writes: each token in the colour of its expert."""

import json

PAGE = '''<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Which expert read which token</title><style>
  :root { color-scheme: light dark; font: 16px/1.5 sans-serif }
  body { max-width: 60rem; margin: auto; padding: 0 1rem } select { font: inherit; margin-right: 1rem }
  header { position: sticky; top: 0; padding: .7rem 0; background: Canvas; border-bottom: 1px solid }
  #experts { display: flex; flex-wrap: wrap; gap: .3rem; text-align: center; font-size: .85rem }
  #experts div { flex: 1; min-width: 2.6rem; height: 7rem }
  #experts div { display: flex; flex-direction: column; justify-content: end }
  #experts b { border: 2px solid } pre span:hover { outline: 2px solid CanvasText }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 1rem/1.6 monospace }
  pre span { color: black } pre + pre { border-top: 1px solid; padding-top: 1em }
</style>
<header><label>layer <select></select></label><output></output><div id="experts"></div></header><main></main>
<script>
const {samples, layer, colours} = DATA              // samples: [text, {layer: [experts, probabilities]}], ...
const [select, output, experts, main] = ['select', 'output', 'div', 'main'].map(
  name => document.querySelector(name))
const add = (to, tag, text) => Object.assign(to.appendChild(document.createElement(tag)), {textContent: text})
const colour = expert => `background: rgb(${colours[expert % colours.length]})`
const spans = samples.map(tokens => ({tokens, pre: add(main, 'pre', '')})).flatMap(({tokens, pre}) =>
  tokens.map(([text, routes]) => Object.assign(add(pre, 'span', text), {routes})))
function show(title, bars, chosen) {                // bars: [expert, its number], ...
  [output.textContent, experts.textContent] = [title, '']
  for (const [expert, number] of bars) {
    const bar = add(experts, 'div', (100 * number).toFixed(1) + '%')
    add(bar, 'i', '').style = `${colour(expert)}; height: ${4.2 * number}rem`
    add(bar, chosen.includes(expert) ? 'b' : 'span', expert)
  }
}
function paint() {
  const probabilities = spans[0].routes[select.value][1], some = probabilities.length > 1   // looked up: none
  const shares = new Map(some ? probabilities.map((_, expert) => [expert, 0]) : [])
  for (const {routes, style} of spans) {
    const [chosen] = routes[select.value]
    style.cssText = colour(chosen[0])
    for (const expert of chosen) shares.set(expert, (shares.get(expert) || 0) + 1 / spans.length)
  }
  const busiest = [...shares].sort((a, b) => b[1] - a[1]).slice(0, 64).sort((a, b) => a[0] - b[0])
  show('share of the tokens that each expert got' + (shares.size > 64 ? ', the busiest 64' : '') + '; a token ' +
       `has the colour of its first expert; point at it for its ${some ? 'probabilities' : 'experts'}`, busiest, [])
}
for (const i in spans[0].routes) add(select, 'option', i)
select.value = layer
select.onchange = main.onpointerleave = paint
main.onpointerover = ({target: {routes, textContent: text}}) => {
  if (!routes) return
  const [chosen, probabilities] = routes[select.value]
  const bars = probabilities.length > 1 ? probabilities.map((p, expert) => [expert, p]) : chosen.map(e => [e, 1])
  show(`${probabilities.length > 1 ? 'probabilities' : 'experts'} of ${JSON.stringify(text)}`, bars, chosen)
}
paint()</script>
'''


def make_page(samples: list, layer: int, colours: tuple[int, ...]) -> str:
    """The page of samples, lists of (text, {layer: (experts, probabilities)}), in colours of xterm's cube."""
    rgb = [[(0, 95, 135, 175, 215, 255)[(n - 16) // place % 6] for place in (36, 6, 1)] for n in colours]
    data = json.dumps({'samples': samples, 'layer': layer, 'colours': rgb})
    return PAGE.replace('DATA', data.replace('<', '\\u003c'))      # a text's '</script>' would end the script
