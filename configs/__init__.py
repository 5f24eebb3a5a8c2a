"""Settings: what can be set, from where, and ready presets (the YAML files beside this one).

Read only where the program is composed (server/__main__.py and server/app.py); everything else is given plain
values.
"""
