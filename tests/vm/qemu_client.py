"""Drives a machine by the library that QEMU's own users have: `qemu_client.py SOCKET`. The last thing it does is quit."""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def main(path):
    client = QMPClient('loopvisor')
    events = []

    async def collect(event):
        events.append(event['event'])

    await client.connect(path)
    assert client.greeting.QMP.version.get('package', '').startswith('loopvisor')
    with client.listener() as listener:
        assert (await client.execute('query-status'))['status'] == 'running'
        assert await client.execute('stop') == {}
        await collect(await asyncio.wait_for(listener.get(), 30))
        assert (await client.execute('query-status')) == {
            'running': False, 'singlestep': False, 'status': 'paused'}
        assert await client.execute('cont') == {}
        await collect(await asyncio.wait_for(listener.get(), 30))
        for command in await client.execute('query-commands'):
            if command['name'].startswith('query-'):
                await client.execute(command['name'])
        [disk, *empty] = await client.execute('query-block')
        assert len(empty) == 5 and not any('inserted' in slot for slot in empty), empty
        assert disk['device'] == 'vda' and disk['inserted']['drv'] == 'raw'
        assert (await client.execute('query-kvm'))['enabled']
        memory = (await client.execute('query-balloon'))['actual']
        assert await client.execute('balloon', {'value': memory - (64 << 20)}) == {}
        for name in 'BALLOON_CHANGED', 'BALLOON_CHANGE':
            event = await asyncio.wait_for(listener.get(), 30)
            assert event['event'] == name and event['data']['actual'] < memory, event
        while (await client.execute('query-balloon'))['actual'] != memory - (64 << 20):
            await asyncio.sleep(0.01)
        # Several at once: the library tells answers apart by their ids.
        answers = await asyncio.gather(*(client.execute('query-name') for _ in range(32)))
        assert answers == [{'name': 'web1'}] * 32
        try:
            await client.execute('no-such-command')
            raise AssertionError('an unknown command succeeded')
        except ExecuteError as error:
            assert error.error_class == 'CommandNotFound'
        try:
            await client.execute('stop', {'now': True})
            raise AssertionError('an unknown argument was taken')
        except ExecuteError as error:
            assert error.error_class == 'GenericError' and 'now' in str(error)
        assert await client.execute('quit') == {}
        event = await asyncio.wait_for(listener.get(), 30)
        while event['event'].startswith('BALLOON'):
            event = await asyncio.wait_for(listener.get(), 30)
        await collect(event)
        assert event['data'] == {'guest': False, 'reason': 'host-qmp-quit'}
    try:
        await client.disconnect()
    except EOFError:
        pass  # The monitor closed the connection first, as it should.
    assert events == ['STOP', 'RESUME', 'SHUTDOWN'], events
    print('all went well')


asyncio.run(main(sys.argv[1]))
