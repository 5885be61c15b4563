"""`python -m clipfreeze`, as launchers of several processes start it."""

from clipfreeze.cli.app import main

if __name__ == "__main__":
    main()
