"""`python -m gateway`: Cog's server and the door before it, as one process to start and to stop."""

from gateway.huge_pages import restart_in_huge_pages

if __name__ == "__main__":
    restart_in_huge_pages()

    from gateway.server import run

    run()
