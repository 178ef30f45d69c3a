"""Who may do what: the keys of a cluster, the credentials made of them, and how machines get theirs.

    keys        nkeys, the private CA and its certificates; imports cryptography
    tokens      the JWTs that a broker in operator mode believes
    authority   the keys of one cluster on disk, and what they give out
    signer      what mints the tokens of units, there and in a control plane
    certificate an executor's for HTTPS: how it gets its own, and who signs it
    ledger      what only who has those keys may say: who signs, who was revoked
    registry    which tickets were made, which units there are, and what revokes them
    enrolment   a machine's side: asking for a credential with a ticket, and renewing it
    admission   the control plane's side of that

Every unit has a key of its own, which never leaves its machine, and a token that names exactly the
subjects that its role needs (`mvmci.trust.permissions`). Tokens are short-lived and renewed. A key
that is revoked is cut off while it is connected, and stays so when the broker restarts.
"""
