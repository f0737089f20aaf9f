"""A data job: records are made, grouped, joined and sorted in memory. Prints a digest of the result.

job.py RECORDS: all is a function of that number, so the digest says whether the memory held. A record
takes some 1.6 KiB of Python objects: dictionaries, strings, integers, lists.
"""

import hashlib
import sys

CITIES = ["Aachen", "Bergen", "Cadiz", "Dublin", "Espoo", "Fulda", "Genoa", "Hull"]
WORDS = "late paid open lost sent back held due new old gift bulk rush cold safe spare".split()


def numbers(seed):
    """The same numbers on every machine (a linear congruential generator)."""
    while True:
        seed = (seed * 6364136223846793005 + 1442695040888963407) & 0xFFFF_FFFF_FFFF_FFFF
        yield seed >> 33


def main():
    count = int(sys.argv[1])
    random = numbers(count)
    orders = {}
    customers = {}
    for key in range(count):
        bits = next(random)
        order = {
            "id": f"order-{key:08d}",
            "customer": bits % (count // 8 + 1),
            "city": CITIES[bits & 7],
            "amount": bits % 99991 + 1000,
            "note": " ".join(WORDS[bits >> shift & 15] for shift in (3, 9, 15)),
            "prices": list(range(bits & 0xFFFFF, (bits & 0xFFFFF) + 32 * 997, 997)),
        }
        orders[order["id"]] = order
        customers.setdefault(order["customer"], []).append(order)

    # Look-ups in no order, and changes to what is found.
    for _ in range(count // 4):
        order = orders[f"order-{next(random) % count:08d}"]
        order["amount"] += order["prices"][3]

    digest = hashlib.sha256()
    best = sorted(customers, key=lambda c: (-sum(o["amount"] for o in customers[c]), c))
    for customer in best:
        total = sum(order["amount"] for order in customers[customer])
        digest.update(f"{customer} {total} {customers[customer][-1]['note']}\n".encode())
    print(digest.hexdigest())


main()
