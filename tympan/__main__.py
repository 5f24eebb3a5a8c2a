"""`python -m tympan`: the command `tympan`."""

from tympan.cli.main import app

if __name__ == "__main__":
    app(prog_name="tympan")
