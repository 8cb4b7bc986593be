"""How fast Headrace is, and whether that is fast enough: each module measures one thing and writes one report."""
