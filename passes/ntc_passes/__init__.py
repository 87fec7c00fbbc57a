"""The passes that ship with ntc, registered through entry points like anybody else's."""
