"""The style sheet of the health page."""

__all__ = ["STYLE"]

STYLE = """
:root{--page:#f6f7f9;--card:#fff;--text:#1b1f24;--soft:#5b6470;--line:#dfe3e8;--green:#1a7f46;--greenish:#e0f3e7;
--amber:#8f5a00;--amberish:#fdf0d2;--violet:#6b46a8;--violetish:#eee6fb;--red:#b3261e;--reddish:#fce4e2;
--some:#3aa76d;--one:#e0a526;--day:#4a7dbd;--bad:#cf4238;--dim:#8f6cc9}
@media(prefers-color-scheme:dark){:root{--page:#101317;--card:#191d23;--text:#e7eaee;--soft:#9aa4b0;--line:#2c333c;
--green:#6fd39b;--greenish:#143323;--amber:#f0c063;--amberish:#382a0d;--violet:#c3a6f4;--violetish:#2d2142;--red:#ff9a92;
--reddish:#431a17;--some:#3aa76d;--one:#d59a1f;--day:#6d9edb;--bad:#d9544a;--dim:#9a7bd0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 20px 40px}
h1{font-size:24px;margin:0;display:flex;flex-wrap:wrap;gap:12px;align-items:center}
h2{font-size:19px;margin:0;display:flex;flex-wrap:wrap;gap:10px;align-items:center}
h3{font-size:13px;margin:22px 0 6px;color:var(--soft);text-transform:uppercase;letter-spacing:.05em}
.name{overflow-wrap:anywhere;min-width:0}
header p,.note,figcaption,footer{color:var(--soft)}
header p{margin:6px 0 0}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px;margin-top:20px}
.verdict{display:inline-block;font-size:13px;font-weight:600;line-height:1.4;border-radius:999px;padding:2px 10px;
white-space:nowrap}
h1 .verdict{font-size:16px;padding:3px 14px}
td .verdict{font-size:12px;padding:1px 8px}
.verdict.healthy{background:var(--greenish);color:var(--green)}
.verdict.degraded{background:var(--amberish);color:var(--amber)}
.verdict.unknown{background:var(--violetish);color:var(--violet)}
.verdict.broken{background:var(--reddish);color:var(--red)}
.why{margin:6px 0 0;overflow-wrap:anywhere}
.alert{background:var(--reddish);color:var(--red);border-radius:8px;padding:10px 14px;overflow-wrap:anywhere}
.clean{color:var(--green);margin:14px 0 0}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:16px 0 0}
dt{color:var(--soft);font-size:13px}
dd{margin:0;font-size:18px;font-weight:600;font-variant-numeric:tabular-nums}
figure{margin:20px 0 0}
ol{list-style:none;margin:0;padding:0;display:flex}
.coverage{height:72px;gap:3px}
.coverage.days{height:84px}
.coverage li{flex:1 1 0;min-width:0;display:flex;flex-direction:column;justify-content:flex-end}
.coverage.days li{position:relative;padding-bottom:12px}
.coverage.dense{gap:1px}
.bar{display:block;border-radius:3px 3px 0 0}
.bar.some{background:var(--some)}
.bar.one{background:var(--one)}
.bar.none{background:repeating-linear-gradient(45deg,var(--bad) 0 3px,var(--reddish) 3px 6px);height:100%!important}
.day{position:absolute;left:0;right:0;bottom:0;height:8px;background:var(--day);border-radius:2px}
.timeline{gap:2px;height:18px}
.timeline li{flex:1 1 0;min-width:0;border-radius:2px;background:var(--line)}
.timeline .healthy{background:var(--some)}
.timeline .degraded{background:var(--one)}
.timeline .unknown{background:var(--dim)}
.timeline .broken{background:var(--bad)}
figcaption{display:flex;justify-content:space-between;gap:12px;font-size:12px;margin-top:4px}
.middle{text-align:center}
figcaption span:not(.middle){white-space:nowrap}
.findings{list-style:none;margin:0;padding:0}
.findings li{padding:7px 0;border-top:1px solid var(--line);overflow-wrap:anywhere}
.findings li:first-child{border-top:0}
.findings .broken{color:var(--red)}.findings .degraded{color:var(--amber)}.findings .unknown{color:var(--violet)}
.findings span{color:var(--soft)}
.findings code{margin:0 2px 0 6px}
code{font:13px ui-monospace,"DejaVu Sans Mono",Menlo,monospace}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th{text-align:left;color:var(--soft);font-weight:500;font-size:12px;padding:4px 8px 4px 0;white-space:nowrap}
td{padding:7px 8px 7px 0;border-top:1px solid var(--line);white-space:nowrap;vertical-align:top}
th:nth-child(n+6),td:nth-child(n+6){text-align:right}
td small{display:block;color:var(--soft);white-space:normal;overflow-wrap:anywhere}
footer{font-size:13px;margin-top:20px}
footer ul{padding-left:18px}
@media(max-width:820px){main{padding:16px 12px 32px}section{padding:16px 14px;border-radius:10px}
dl{grid-template-columns:1fr 1fr}thead{display:none}table,tbody,tr,td{display:block;width:auto}
tr{border-top:1px solid var(--line);padding:10px 0;display:grid;grid-template-columns:1fr 1fr;gap:3px 14px}
td{border:0;padding:0;display:flex;justify-content:space-between;gap:8px;text-align:right;white-space:normal}
td:nth-child(n){text-align:right}
td::before{content:attr(data-name);color:var(--soft);font-size:12px}
td:first-child{grid-column:1/-1;justify-content:flex-start;text-align:left}
td:first-child::before{content:none}
td:first-child small{margin-left:8px}}
@media(max-width:420px){.coverage{gap:1px}.timeline{gap:1px}}
"""
