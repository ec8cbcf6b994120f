"""The style sheet of the report: one column on a phone, two where there is room, and for the printer."""

STYLE = """
:root { color-scheme: light; --ink: #1b1b1b; --soft: #555; --line: #d5d5d5; --back: #fff; --link: #00568a; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0 auto; padding: 0 1rem 2rem; max-width: 84rem; background: var(--back); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 1.2rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem; padding-top: .5rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
a { color: var(--link); }
.state { margin: .2rem 0 .8rem; padding-left: .6rem; border-left: .35rem solid #999; }
.state.running, .state.finished { border-color: #009E73; }
.state.silent, .state.interrupted { border-color: #E69F00; }
.state.stopped, .state.timed { border-color: #D55E00; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .5rem; margin: 0; }
.numbers div { border: 1px solid var(--line); border-radius: .3rem; padding: .35rem .6rem; }
.numbers dt { color: var(--soft); font-size: .8rem; }
.numbers dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: 1rem 0 0; list-style: none; }
nav a { display: inline-block; padding: .35rem 0; }
.tables { display: flex; flex-wrap: wrap; gap: 0 4rem; }
.pictures { column-gap: 2rem; margin-top: 1.2rem; }
figure { margin: 0 0 1.4rem; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .2rem; }
.scroll { overflow-x: auto; max-width: 100%; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .85rem; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; }
th:first-child { text-align: left; }
tbody th { font-weight: 400; }
.events th, .events td { text-align: left; }
.events th { white-space: nowrap; }
.events td:last-child { min-width: 16rem; overflow-wrap: anywhere; }
.domains thead th { vertical-align: bottom; }
summary { cursor: pointer; padding: .3rem 0; }
pre { overflow-x: auto; background: #f5f5f5; padding: .8rem; margin: .3rem 0; font-size: .82rem; line-height: 1.35; }
footer { margin-top: 2rem; border-top: 1px solid var(--line); color: var(--soft); font-size: .85rem; }
@media (min-width: 62rem) { .pictures { columns: 2; } }
@media (max-width: 40rem) { table { font-size: .82rem; } th, td { padding-right: .45rem; } }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .pictures { columns: 2; column-gap: 1rem; }
  h2, h3 { break-after: avoid; }
  pre { white-space: pre-wrap; background: none; border: 1px solid var(--line); }
  .scroll { overflow: visible; }
}
"""
