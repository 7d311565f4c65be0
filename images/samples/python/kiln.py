import humanize

print(f"Python has fired {humanize.intcomma(1234567)} pots")
