"""A foreign publisher: sends what it is told to a JetStream subject, by nats-py.

Reads one message id per line from standard input; the body is {"id": ID}. An empty line waits
until the stream's own duplicate window (100 ms in the tests) is over.
"""
import asyncio
import sys

import nats


async def main(url, subject):
    connection = await nats.connect(url)
    stream = connection.jetstream()
    sent = 0
    for line in sys.stdin:
        message_id = line.strip()
        if not message_id:
            await asyncio.sleep(0.5)
            continue
        body = f'{{"id": "{message_id}"}}'.encode()
        ack = await stream.publish(subject, body, headers={"Nats-Msg-Id": message_id})
        sent += 0 if ack.duplicate else 1
    await connection.close()
    print(sent)


asyncio.run(main(*sys.argv[1:]))
