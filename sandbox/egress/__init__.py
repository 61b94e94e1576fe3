"""The egress gateway: every connection of a call named, judged, metered and recorded, outside the jail.

`rules`, `addresses`, `names` and `journal` are pure; `gateway` is a process of its own; `client` is the supervisor's
end of it. docs/egress.md says how it works.
"""
